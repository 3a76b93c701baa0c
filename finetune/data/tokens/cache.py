"""Prepared rows are kept on disk under a fingerprint of everything that they depend on.

    $FINETUNE_CACHE, else $XDG_CACHE_HOME/moe-finetune, else ~/.cache/moe-finetune

An entry is a folder that appears whole, by one rename, or not at all. Nothing refers to it from elsewhere: the cache
may be deleted at any time.
"""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import DataError, Problem
from finetune.recipe import DataSettings, DataSource, row_formats

_LITTLE_ROOM = 1 << 16  # bytes
_LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "pyarrow", "numpy")
# What of the settings decides the token rows of one source. The rest (weights, packing) is applied to them later.
_SOURCE_KEYS = ("config", "split", "format", "columns", "max_rows")
_DATA_KEYS = ("max_length", "overlong", "loss_on", "system", "on_bad_row", "max_bad_share")

_CLOCK = "strftime_now"


def cache_folder() -> Path:
    """Where entries are kept; need not exist."""
    if folder := os.environ.get("FINETUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moe-finetune"


def digest(parts: Mapping[str, Any]) -> str:
    """A name for an entry: the hash of everything that it depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def rows_fingerprint(
    paths: Sequence[str], content: str, source: DataSource, settings: DataSettings, tokenizer: Any, kind: str
) -> dict[str, Any]:
    """What the token rows of one source depend on; `content` is the hash of what is in its files, the `paths`."""
    return {
        "kind": kind,  # single rows or pairs
        "paths": list(paths),  # stand in the rows and in messages
        "content": content,
        "source": {key: getattr(source, key) for key in _SOURCE_KEYS},
        "settings": {key: getattr(settings, key) for key in _DATA_KEYS},
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
        # Templates of Llama 3.1 and later write the day on which they run.
        "day": date.today().isoformat() if _CLOCK in str(tokenizer.chat_template) else None,
        "code": _code(),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


@cache
def _code() -> str:
    """The hash of the source that makes rows: a mended format or mask must not meet rows of the broken one."""
    room = Path(__file__).parents[1]
    paths = sorted(path for path in room.rglob("*") if path.suffix in (".py", ".jinja"))
    paths.append(Path(row_formats.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def entry(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of the entry `name`; `write` fills a new one if there is none yet.

    Two writers at once do the work twice and keep one result. What `write` raises leaves nothing behind; what a killed
    process left behind is removed by the next writer.
    """
    root = cache_folder()
    target = root / name
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    temporary = root / f".{name}.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with _room(root):
            write(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextmanager
def _room(root: Path) -> Iterator[None]:
    """A full disk as an error that says which; numpy and pyarrow name neither the file nor, at times, the cause."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or shutil.disk_usage(root).free < _LITTLE_ROOM
        if error.filename is not None or not full:
            raise
        do = "make room, or name a folder with more in FINETUNE_CACHE"
        raise DataError(Problem(str(root), "no room to keep the prepared rows", do, str(error))) from error


def _remove_left_behind(root: Path) -> None:
    """Remove what writers of this machine that are no longer alive had begun."""
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
