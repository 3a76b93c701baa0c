"""Kept log-probabilities of the reference: continued after a kill, refused where anything differs."""

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.data import TokenPair
from finetune.errors import RunError
from finetune.methods.reference import ReferenceStore, checksum, digest_of

MADE_FROM = {"base": "b", "adapter": None, "quantisation": "nf4, float32", "template": "t", "train data": "d"}


def pair(number: int) -> TokenPair:
    ids = [np.array([number + i], np.int32) for i in range(3)]
    return TokenPair(ids[0], ids[1], ids[1], ids[2], ids[2], f"pairs.jsonl:{number + 1}")


PAIRS = [pair(number) for number in range(5)]


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    store = ReferenceStore(tmp_path / "reference", MADE_FROM)
    store.open(is_main=True)
    return store


def write(store: ReferenceStore, rank: int, *indices: int) -> None:
    store.append("train", rank, [(index, PAIRS[index], -1.5 * index, -2.0 * index) for index in indices])


def test_what_two_processes_wrote_is_read_as_one_in_the_order_of_the_pairs(store: ReferenceStore) -> None:
    write(store, 0, 0, 3)
    write(store, 1, 1, 2, 4)
    assert store.missing("train", PAIRS) == []
    assert store.read("train", PAIRS).tolist() == [[-1.5 * i, -2.0 * i] for i in range(5)]


def test_after_a_kill_only_what_is_missing_is_computed_and_the_half_line_is_taken_out(store: ReferenceStore) -> None:
    write(store, 0, 0, 1, 2)
    path = store.folder / "train.0.jsonl"
    path.write_text(path.read_text()[:-7])
    again = ReferenceStore(store.folder, MADE_FROM)
    again.open(is_main=True)
    assert again.missing("train", PAIRS) == [2, 3, 4]
    again.repair("train", 0)
    write(again, 0, 2, 3, 4)
    assert [json.loads(line)["pair"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert again.read("train", PAIRS)[2].tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("what", list(MADE_FROM))
def test_a_reference_made_from_something_else_is_refused_by_name(store: ReferenceStore, what: str) -> None:
    other = ReferenceStore(store.folder, {**MADE_FROM, what: "another"})
    with pytest.raises(RunError) as caught:
        other.open(is_main=True)
    assert str(caught.value) == (
        f"{store.folder}: these log-probabilities of the reference were made from another {what}; "
        "put back what was changed to go on, or remove the folder, or name another output_dir"
    )


def test_values_that_do_not_say_what_they_were_made_from_are_refused(store: ReferenceStore) -> None:
    write(store, 0, 0, 1)
    (store.folder / "made_from.json").unlink()
    with pytest.raises(RunError) as caught:
        ReferenceStore(store.folder, MADE_FROM).open(is_main=True)
    assert str(caught.value) == (
        f"{store.folder}: log-probabilities of a reference, and no made_from.json that says what they were made from; "
        "remove it"
    )


def test_a_pair_that_is_missing_is_named(store: ReferenceStore) -> None:
    write(store, 0, 0, 1, 2, 4)
    with pytest.raises(RunError, match="the reference of train pair 3 is missing; start the run again"):
        store.read("train", PAIRS)


def test_a_pair_whose_tokens_have_changed_is_named(store: ReferenceStore) -> None:
    write(store, 0, 0, 1, 2, 3, 4)
    with pytest.raises(RunError) as caught:
        store.read("train", [*PAIRS[:4], PAIRS[3]])
    assert str(caught.value) == (
        "pairs.jsonl:4: the reference's log-probabilities were made from other tokens than this row has now; "
        f"put the data back, or remove {store.folder}"
    )


def test_a_value_that_is_not_finite_names_its_row(store: ReferenceStore) -> None:
    with pytest.raises(RunError) as caught:
        store.append("train", 0, [(1, PAIRS[1], float("nan"), -1.0)])
    assert str(caught.value) == (
        "pairs.jsonl:2: the reference's log-probability of its answers is not finite; got nan, -1.0; "
        "look at this row, and use model.dtype bfloat16 instead of float16"
    )
    assert store.missing("train", PAIRS) == [0, 1, 2, 3, 4], "nothing of the batch was written"


@pytest.mark.parametrize("line", ["{", '{"pair": 1}', '["pair"]', '{"pair": "x", "tokens": 1, "logps": []}'])
def test_a_foreign_line_is_refused(store: ReferenceStore, line: str) -> None:
    write(store, 0, 0)
    with (store.folder / "train.0.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"train\.0\.jsonl:2: not a line that a run has written"):
        store.read("train", PAIRS)


def test_the_checksum_knows_labels_lengths_and_order() -> None:
    one = PAIRS[0]
    masked = TokenPair(
        one.prompt_ids, one.chosen_ids, np.array([-100], np.int32), one.rejected_ids, one.rejected_labels, one.row
    )
    swapped = TokenPair(
        one.prompt_ids, one.rejected_ids, one.rejected_labels, one.chosen_ids, one.chosen_labels, one.row
    )
    assert len({checksum(pair) for pair in (one, masked, swapped, PAIRS[1])}) == 4
    assert digest_of(PAIRS) != digest_of(PAIRS[::-1])
