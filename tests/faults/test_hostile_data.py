"""Files of rows that are damaged at random: an error that names the file, or its rows; never a crash, never a hang."""

from pathlib import Path

import pytest

from tests.faults.harness import SEED
from tests.hostile_rows import damaged_files, outcomes

FILES, A_FOLDER = 2000, 250


@pytest.mark.faults
@pytest.mark.parametrize("first", range(0, FILES, A_FOLDER))
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, first: int) -> None:
    damaged_files(tmp_path, [f"{SEED}-{number}" for number in range(first, first + A_FOLDER)])
    read = outcomes(tmp_path)
    assert len(read) == A_FOLDER
    assert [outcome for outcome in read.values() if outcome.died] == []
    assert [outcome.name for outcome in read.values() if not outcome.rows and not outcome.messages] == []
