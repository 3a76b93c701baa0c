"""Token rows on disk: what was written is what is read, row by row and as a data set."""

from pathlib import Path

import numpy as np
from datasets import Dataset

from finetune.data.tokens.cache import BATCH_TOKENS, PACKED, ROWS, TokenTable, Writer


def test_rows_are_found_in_every_batch_of_the_file(tmp_path: Path) -> None:
    """Batches end where enough tokens are collected: the first holds two rows, the second one, the third two."""
    lengths = [3, BATCH_TOKENS, BATCH_TOKENS + 1, 1, 2]
    rows = [np.arange(length, dtype=np.int32) + number for number, length in enumerate(lengths)]
    with Writer(tmp_path / "rows.arrow", ROWS) as writer:
        for number, ids in enumerate(rows):
            writer.append(ids, -ids, f"f:{number}")
    table, dataset = TokenTable(tmp_path / "rows.arrow"), Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert len(table) == len(dataset) == 5
    for number, ids in enumerate(rows):
        (found, labels), where = table.row(number)
        assert np.array_equal(found, ids)
        assert np.array_equal(labels, -ids)
        assert where == f"f:{number}"
        assert dataset[number]["row"] == where
        assert len(dataset[number]["labels"]) == lengths[number]


def test_packed_rows_carry_positions_and_all_their_places(tmp_path: Path) -> None:
    ids = np.array([5, 6, 7], dtype=np.int32)
    with Writer(tmp_path / "packed.arrow", PACKED) as writer:
        writer.append(ids, ids, np.array([0, 1, 0], dtype=np.int32), ["f:1", "g:2"])
    [row] = Dataset.from_file(str(tmp_path / "packed.arrow"))
    assert row == {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "position_ids": [0, 1, 0], "row": ["f:1", "g:2"]}


def test_a_file_without_rows_is_empty(tmp_path: Path) -> None:
    with Writer(tmp_path / "rows.arrow", ROWS):
        pass
    assert len(TokenTable(tmp_path / "rows.arrow")) == 0
