"""The base and the rows that every equivalence class shares."""

from pathlib import Path

import pytest

from tests.equivalence.sft_runs import write_rows
from tests.support import save_tiny_mixtral


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
