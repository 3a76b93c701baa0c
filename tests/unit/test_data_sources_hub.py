"""Data sets of the hub, against a hub on this machine: rows, the commit they come from, and what can go wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data.sources import open_source
from finetune.errors import DataError
from finetune.recipe import DataSource
from tests.hub import COMMIT, serving
from tests.sources import json_lines

TRAIN: list[dict[str, Any]] = [{"prompt": "a", "answer": None}, {"prompt": "b\u2028", "answer": "é"}]
CALLS = [{"calls": [{"arguments": {"x": 1}}]}, {"calls": [{"arguments": {"y": "z"}}]}]
OLD = [{"prompt": "old", "answer": "x"}]
TWO = """---
configs:
- config_name: first
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
- config_name: second
  data_files: test.jsonl
---
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


MAIN, V1 = COMMIT["main"], COMMIT["v1"]
SETS: dict[str, dict[str, dict[str, bytes]]] = {
    "owner/one": {MAIN: {"train.jsonl": json_lines(TRAIN)}, V1: {"train.jsonl": json_lines(OLD)}},
    "owner/two": {
        MAIN: {"README.md": TWO.encode(), "train.jsonl": json_lines(TRAIN), "test.jsonl": json_lines(OLD)},
    },
    "owner/table": {MAIN: {"data/train-0.parquet": parquet(TRAIN * 150), "data/test-0.parquet": parquet(OLD)}},
    "owner/calls": {MAIN: {"train.jsonl": json_lines(CALLS)}},
    "owner/broken": {MAIN: {"train.jsonl": json_lines(TRAIN) + b'{"prompt": \n'}},
    "owner/script": {MAIN: {"script.py": b"raise SystemExit('was run')"}},
    "owner/empty": {MAIN: {"README.md": b"nothing"}},
    "owner/gated": {MAIN: {"train.jsonl": json_lines(TRAIN)}},
}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"id": "owner/one"},
    "streaming": {"id": "owner/one", "streaming": True},
    "a tag": {"id": "owner/one", "revision": "v1"},
    "a commit": {"id": "owner/one", "revision": MAIN},
    "configuration and split": {"id": "owner/two", "config": "first", "split": "test"},
    "table": {"id": "owner/table"},
    "table, streaming": {"id": "owner/table", "streaming": True},
    "part of a split": {"id": "owner/table", "split": "train[:1%]"},
    "mixed": {"id": "owner/calls"},
    "mixed, streaming": {"id": "owner/calls", "streaming": True},
    "no set": {"id": "owner/nothing"},
    "no revision": {"id": "owner/one", "revision": "v2"},
    "no configuration": {"id": "owner/two", "config": "third"},
    "which configuration": {"id": "owner/two"},
    "no split": {"id": "owner/two", "config": "first", "split": "validation"},
    "no split, streaming": {"id": "owner/two", "config": "first", "split": "validation", "streaming": True},
    "part of a split, streaming": {"id": "owner/table", "split": "train[:1%]", "streaming": True},
    "gated": {"id": "owner/gated"},
    "script": {"id": "owner/script"},
    "empty": {"id": "owner/empty"},
    "broken": {"id": "owner/broken"},
    "broken, streaming": {"id": "owner/broken", "streaming": True},
}
OFFLINE: dict[str, dict[str, Any]] = {
    "in the cache": {"id": "owner/two", "config": "first", "split": "test", "revision": MAIN},
    "which commit": {"id": "owner/two", "config": "first", "split": "test"},
    "not in the cache": {"id": "owner/nothing"},
    "streaming": {"id": "owner/one", "streaming": True},
}


def outcomes(cases: dict[str, dict[str, Any]], **environment: str) -> dict[str, Any]:
    """What a process of its own makes of the cases: the libraries read the environment once."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.read_sources"],
        input=json.dumps(list(cases.values())),
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def online(home: Path) -> Iterator[dict[str, Any]]:
    with serving(SETS, gated={"owner/gated"}) as hub:
        yield outcomes(CASES, HF_ENDPOINT=hub.address, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY="1")


@pytest.mark.parametrize("case", ["plain", "streaming", "a commit"])
def test_a_set_gives_its_rows_streaming_or_not(online: dict[str, Any], case: str) -> None:
    found = online[case]
    assert found["rows"] == TRAIN
    assert (found["name"], found["unit"], found["progress"]) == ("owner/one[train]", " rows", 2)
    assert found["total"] in ((2, None) if case == "streaming" else (2,))


def test_tables_are_read_beyond_a_batch(online: dict[str, Any]) -> None:
    assert online["table"]["rows"] == online["table, streaming"]["rows"] == TRAIN * 150
    assert online["part of a split"]["rows"] == (TRAIN * 150)[:3]


def test_columns_of_mixed_types_are_what_the_file_holds(online: dict[str, Any]) -> None:
    assert online["mixed"]["rows"] == online["mixed, streaming"]["rows"] == CALLS


def test_configuration_and_split_choose_the_files(online: dict[str, Any]) -> None:
    assert online["configuration and split"]["rows"] == OLD
    assert online["configuration and split"]["name"] == "owner/two[first, test]"


def test_the_fingerprint_is_the_commits_however_the_recipe_names_it(online: dict[str, Any]) -> None:
    assert online["a tag"]["rows"] == OLD
    plain, streaming, commit, tag = (
        online[case]["fingerprint"] for case in ("plain", "streaming", "a commit", "a tag")
    )
    assert plain == streaming == commit != tag
    assert len({online[case]["fingerprint"] for case in ("table", "part of a split", "configuration and split")}) == 3


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "no set",
            "owner/nothing: no such data set on the hub; check the name; if the set is private, log in (`hf auth "
            "login`, or HF_TOKEN)",
        ),
        (
            "no revision",
            "owner/one: the data set has no such revision; got v2; write a branch, tag or commit of it",
        ),
        ("no configuration", "owner/two: no such configuration; got third; write config: first or second"),
        ("which configuration", "owner/two: the data set has several configurations; write config: first or second"),
        ("no split", "owner/two: no such split; got validation; write split: train or test"),
        ("no split, streaming", "owner/two: no such split; got validation; write split: train or test"),
        (
            "part of a split, streaming",
            "owner/table: part of a split cannot be streamed; got train[:1%]; write streaming: false, or max_rows",
        ),
        (
            "gated",
            "owner/gated: the data set is gated; accept its terms on its page, then log in (`hf auth login`, or "
            "HF_TOKEN)",
        ),
        (
            "script",
            "owner/script: the data set is a Python script, and scripts are not run; take a version with data files: "
            "often revision: refs/convert/parquet",
        ),
        ("empty", "owner/empty: the data set cannot be opened; got "),
        ("broken", "owner/broken: the data set cannot be opened; got "),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(online: dict[str, Any], case: str, message: str) -> None:
    refused = online[case]["refused"]
    assert refused.startswith(message)
    assert "\n" not in refused


def test_a_stream_that_breaks_is_no_end_of_the_rows(online: dict[str, Any]) -> None:
    [*rows, message] = online["broken, streaming"]["rows"]
    assert rows in ([], TRAIN)
    assert message.startswith(f"owner/broken[train]:{len(rows) + 1}: the data set cannot be read further; got ")


@pytest.fixture(scope="module")
def offline(home: Path, online: dict[str, Any]) -> dict[str, Any]:
    return outcomes(OFFLINE, HF_HOME=str(home), HF_ENDPOINT="http://127.0.0.1:9")


class TestWithoutANetwork:
    """What the cache holds can be read, if the recipe says which commit that must be."""

    def test_a_commit_in_the_cache_is_read(self, online: dict[str, Any], offline: dict[str, Any]) -> None:
        assert offline["in the cache"] == online["configuration and split"]

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            (
                "which commit",
                "owner/two: the hub cannot be reached, so that only a commit in the local cache can be read; got "
                f"revision null; check the network, or write revision: {MAIN}, the one that is there",
            ),
            (
                "not in the cache",
                "owner/nothing: the hub cannot be reached, and the set is not in the local cache; check the network "
                "and HF_HUB_OFFLINE, or run once where there is a network",
            ),
            (
                "streaming",
                "owner/one: the hub cannot be reached; check the network, or write streaming: false and download the "
                "set first",
            ),
        ],
    )
    def test_everything_else_is_refused(self, offline: dict[str, Any], case: str, message: str) -> None:
        assert offline[case]["refused"] == message

    def test_so_it_is_where_the_user_switched_the_network_off(self) -> None:
        with pytest.raises(DataError, match="owner/nothing: the hub cannot be reached, and the set is not in the"):
            open_source(DataSource(id="owner/nothing", format="auto"))
