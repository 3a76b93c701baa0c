"""Files that tell of a folder, read with suspicion: what they do not hold is a line of the error, no traceback."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.adapters.adapter import RECORD_FILE
from finetune.checkpoint.reader import read_json
from finetune.errors import Problem, WeightsError

_DO = "copy the file again, or remove it"
# Parts of an adapter's record, each an object where it is there.
_OBJECTS = ("base", "recipe", "versions", "adapter", "layout", "metrics")


@contextmanager
def told_by(file: Path, writer: str) -> Iterator[None]:
    """Raise WeightsError where what is read of `file` in here lacks something, or is of another type."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"does not have the fields that {writer} writes"
        got = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(Problem(str(file), what, _DO, got)) from error


def read_record(folder: Path) -> dict[str, Any]:
    """What training wrote beside an adapter; empty for one that was made elsewhere."""
    file = folder / RECORD_FILE
    record = read_json(file) if file.is_file() else {}
    problems = [
        Problem(f"{file}: {name}", "must be an object", _DO, type(value).__name__)
        for name in _OBJECTS
        if not isinstance(value := record.get(name) or {}, Mapping)
    ]
    if problems:
        raise WeightsError(problems)
    base = record.get("base") or {}
    problems = [
        Problem(f"{file}: base.{name}", "must be text", _DO, type(base[name]).__name__)
        for name in ("name_or_path", "fingerprint")
        if not isinstance(base.get(name) or "", str)
    ]
    if problems:
        raise WeightsError(problems)
    return record
