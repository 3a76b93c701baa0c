"""Settings of one data set -> its rows, one after another, from files or from the hub."""

from collections.abc import Iterator
from typing import Protocol

from finetune.data.row_errors import Row
from finetune.data.sources.data_files import find_files
from finetune.data.sources.local import LocalSource
from finetune.recipe import DataSource


class Source(Protocol):
    """Rows in their order; may be read again and again. Only a few rows are held at a time."""

    @property
    def name(self) -> str:
        """The name of the whole in messages: the path or the id of the recipe."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of each part in messages, as in `Row.path`."""
        ...

    @property
    def total(self) -> int | None:
        """The sum of the rows' `progress`, in `unit`; None: not known before the end."""
        ...

    @property
    def unit(self) -> str:
        """`B` (bytes on disk) or ` rows`."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """All rows, bad ones included. An error that breaks a file is its last row; those of the next file follow."""
        ...

    def fingerprint(self) -> str:
        """The same for the same rows in the same order; of the content, not of names and times."""
        ...


def open_source(settings: DataSource) -> Source:
    """The source; `DataError` with all paths that are missing or cannot be read, or why a hub set cannot be opened."""
    if settings.path is not None:
        return open_files(settings.path)
    from finetune.data.sources.hub import open_hub  # the library behind it is slow to import

    return open_hub(settings)


def open_files(path: str) -> Source:
    """A file, a glob, or a folder of `datasets.save_to_disk`."""
    return LocalSource(path, tuple(find_files(path)))


__all__ = ["Source", "open_files", "open_source"]
