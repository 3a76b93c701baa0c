"""Prepared rows on disk: the cache of entries, the Arrow files in them, and an index of keys seen before.

Entries are kept under a fingerprint of everything that they depend on, in

    $FINETUNE_CACHE, else $XDG_CACHE_HOME/moe-finetune, else ~/.cache/moe-finetune

An entry is a folder that appears whole, by one rename, or not at all. Nothing refers to it from elsewhere: the cache
may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from finetune.data.render import stop_tokens, template_args, template_day
from finetune.data.types import Ints
from finetune.errors import DiskError, disk_problem
from finetune.files import disk_named
from finetune.recipe import DataSettings, DataSource, row_formats

_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
# The settings that the token rows of one source depend on. The rest (weights, packing) is applied to them later.
_SOURCE_KEYS = (
    *("config", "split", "format", "columns", "ignore_columns", "roles"),
    *("response_template", "response_end", "max_rows"),
)
_DATA_KEYS = (
    *("max_length", "overlong", "max_row_characters", "loss_on", "system"),
    *("on_bad_row", "max_bad_share", "train_on_reasoning"),
)


def cache_folder() -> Path:
    """Where entries are kept; need not exist."""
    if folder := os.environ.get("FINETUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-finetune"


def digest(parts: Mapping[str, Any]) -> str:
    """A name for an entry: the hash of everything that it depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def rows_fingerprint(
    paths: Sequence[str], content: str, source: DataSource, settings: DataSettings, tokenizer: Any, example_type: str
) -> dict[str, Any]:
    """All that the token rows of one source depend on; `content` is the hash of the contents of its files, `paths`."""
    return {
        "example_type": example_type,
        "paths": list(paths),  # are part of the rows and of messages
        "content": content,
        "source": {key: getattr(source, key) for key in _SOURCE_KEYS},
        "settings": {key: getattr(settings, key) for key in _DATA_KEYS},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        "day": template_day(tokenizer),
        "template_args": template_args(tokenizer),
        "stop_tokens": stop_tokens(tokenizer),
        "code": _code(),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


@cache
def _code() -> str:
    """The hash of the source that makes rows: rows of a wrong format or mask must not be used once it is corrected."""
    package = Path(__file__).parents[1]
    paths = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".jinja"))
    paths.append(Path(row_formats.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def entry(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of the entry `name`; `write` fills a new one if there is none yet.

    Two writers at once do the work twice and keep one result. Nothing is left behind where `write` raises; the next
    writer removes the files of a killed process.
    """
    root = cache_folder()
    target = root / name
    if target.is_dir():
        return target
    temporary = root / f".{name}.{socket.gethostname()}.{os.getpid()}"
    with disk_named(root, elsewhere="set FINETUNE_CACHE to a folder on another disk"):
        root.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(root)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            _rename(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _rename(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _remove_left_behind(root: Path) -> None:
    """Remove the unfinished entries of writers of this machine that are no longer alive."""
    for path in root.glob(f".*.{socket.gethostname()}.*"):
        pid = path.name.rpartition(".")[2]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


IDS = pa.list_(pa.int32())
ROWS = pa.schema([("input_ids", IDS), ("labels", IDS), ("row", pa.string())])
PAIRS = pa.schema(
    [
        *((name, IDS) for name in ("prompt_ids", "chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels")),
        ("row", pa.string()),
    ]
)
PACKED = pa.schema([("input_ids", IDS), ("labels", IDS), ("position_ids", IDS), ("row", pa.list_(pa.string()))])

BATCH_TOKENS = 1 << 18
"""Tokens that are collected before they are written: some MB of memory, and few batches to map."""


class Writer:
    """Writes rows to `path`; `row` is where each came from, as `file:line`. Close it before the file is read."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._stream = pa.ipc.new_stream(path, schema)
        self._columns: list[list[object]] = [[] for _ in schema]
        self._tokens = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None:
            self._flush()
        self._stream.close()

    def append(self, *row: object) -> None:
        """Add one row, its columns in the schema's order; token columns are int32 arrays."""
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        self._tokens += max(len(value) for value in row[:-1])  # type: ignore[arg-type]
        if self._tokens >= BATCH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._columns[0]:
            arrays = [_array(field, column) for field, column in zip(self._schema, self._columns, strict=True)]
            self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._columns = [[] for _ in self._schema]
        self._tokens = 0


def _array(field: pa.Field, column: list[object]) -> pa.Array:
    if field.type != IDS:
        return pa.array(column, type=field.type)
    offsets = np.cumsum([0, *map(len, column)], dtype=np.int32)  # type: ignore[arg-type]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(column)))  # type: ignore[arg-type]


class TokenTable:
    """The rows of a written file, memory-mapped: nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with pa.memory_map(str(path)) as mapped:
            self._batches = [_Batch(batch) for batch in pa.ipc.open_stream(mapped)]
        self._ends = np.cumsum([len(batch.where) for batch in self._batches], dtype=np.int64)

    def __reduce__(self) -> tuple[object, ...]:
        """A process of a data loader maps the file itself."""
        return TokenTable, (self._path,)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> tuple[list[Ints], str]:
        """The token columns of a row, in the schema's order (views into the file), and its `file:line`."""
        position = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[position]
        inside = index - (int(self._ends[position]) - len(batch.where))
        columns = [values[offsets[inside] : offsets[inside + 1]] for offsets, values in batch.columns]
        return columns, batch.where[inside].as_py()

    def lengths(self, column: int) -> Ints:
        """How long a token column is in each row; of the file only where its rows end is read."""
        ends = [np.diff(batch.columns[column][0]) for batch in self._batches]
        return np.concatenate(ends) if ends else np.empty(0, dtype=np.int32)


class _Batch:
    """Views of one record batch: of each token column its offsets and values, and where the rows came from."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        *tokens, self.where = batch.columns
        self.columns: list[tuple[Ints, Ints]] = [
            (column.offsets.to_numpy(), column.values.to_numpy()) for column in tokens
        ]


class Seen:
    """Remembers where each key came first. Keys are kept as 64-bit hashes, SQLite spills what its cache cannot hold."""

    def __init__(self) -> None:
        # The empty name is SQLite's own: a temporary file, unlinked at once.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY, place TEXT)")
        self._database.execute("BEGIN")

    def __enter__(self) -> "Seen":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def first(self, key: str, place: str) -> str | None:
        """The place at which `key` came before; None, and `place` is remembered, if it is new."""
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "big", signed=True)
        insert = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        try:
            if self._database.execute(insert, (number, place)).rowcount:
                return None
            earlier: str = self._database.execute("SELECT place FROM seen WHERE key = ?", (number,)).fetchone()[0]
        except sqlite3.OperationalError as error:
            raise _temporary_disk(error) from error
        return earlier


def _temporary_disk(error: sqlite3.OperationalError) -> Exception:
    """The error of SQLite's temporary file, which it makes once its cache is full, with the folder that it takes."""
    folders = [os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp", "/tmp", "."]
    folder = next(Path(each) for each in folders if (each and os.access(each, os.W_OK | os.X_OK)) or each == ".")
    problem = disk_problem(error, folder, elsewhere="set SQLITE_TMPDIR to a folder on another disk")
    return error if problem is None else DiskError(problem)
