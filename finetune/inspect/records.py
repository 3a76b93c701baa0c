"""Files that tell of a folder, read with suspicion: what they do not hold is a line of the error, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import Problem, WeightsError

_DO = "copy the file again, or remove it"


@contextmanager
def told_by(file: Path, writer: str) -> Iterator[None]:
    """Raise WeightsError where what is read of `file` in here lacks something, or is of another type."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"does not have the fields that {writer} writes"
        got = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(Problem(str(file), what, _DO, got)) from error
