"""A data set of the Hugging Face hub as one source of rows. Nothing of it is executed: its data files are read.

The revision is resolved to its commit once, and everything is read at that commit.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from finetune.data.row_errors import FileError, Row
from finetune.data.sources.tables import rows_of
from finetune.errors import DataError, DiskError, Problem, disk_problem
from finetune.recipe import DataSource
from finetune.upstream import private

_Cache = private("datasets.packaged_modules.cache.cache:Cache")

_PIECE = 100
"""Rows taken from the library at a time."""

_LATEST = {"version": "auto", "hash": "auto"}
_LOG_IN = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True)
class HubSource:
    """One split of a data set at one commit. Not streaming, all of it is downloaded before the first row."""

    name: str
    total: int | None
    commit: str
    config: str
    split: str
    rows: Any
    unit: str = " rows"

    @property
    def paths(self) -> tuple[str, ...]:
        """Its name alone."""
        return (self.name,)

    def __iter__(self) -> Iterator[Row]:
        number = 0
        try:
            for table in self.rows.with_format("arrow").iter(batch_size=_PIECE):
                for value in rows_of(table):
                    number += 1
                    yield Row(self.name, number, 1, value)
        except FileError as error:
            yield Row(self.name, number + 1, 0, error)
        # Everything can go wrong while another library downloads and parses: it must become a message with its place.
        except Exception as error:
            cannot = FileError("the data set cannot be read further", "check the network, then the set", _reason(error))
            yield Row(self.name, number + 1, 0, cannot)

    def fingerprint(self) -> str:
        """Commit, configuration and split: a commit never changes."""
        return hashlib.sha256(f"{self.commit} {self.config} {self.split}".encode()).hexdigest()


def open_hub(settings: DataSource) -> HubSource:
    """The split; `DataError` names the splits there are, or why it cannot be opened."""
    assert settings.id is not None
    name = f"{settings.id}[{', '.join(filter(None, (settings.config, settings.split)))}]"
    with _library_errors(settings):
        commit = _commit(settings)
        builder = _builder(settings, commit)
        _check_split(settings, builder)
        if settings.streaming:
            rows = builder.as_streaming_dataset(split=settings.split)
            about = (builder.info.splits or {}).get(settings.split)
            total = about.num_examples if about else None
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=settings.split)
            total = len(rows)
    return HubSource(name, total, builder.hash, builder.config.name, settings.split, rows)


def _commit(settings: DataSource) -> str | None:
    """The commit of the revision; None if the hub is not to be asked or does not answer."""
    if datasets.config.HF_HUB_OFFLINE:
        return None
    try:
        sha: str | None = HfApi().dataset_info(str(settings.id), revision=settings.revision).sha
    except (OfflineModeIsEnabled, httpx.TransportError):
        return None
    return sha


def _builder(settings: DataSource, commit: str | None) -> Any:
    if commit is not None:
        return datasets.load_dataset_builder(settings.id, settings.config, revision=commit)
    what = "the hub cannot be reached"
    if settings.streaming:
        raise _error(settings, what, "check the network, or write streaming: false and download the set first")
    try:
        # The library's own fallback, which it takes only after half a minute of trying.
        name = str(settings.id)
        builder = _Cache(repo_id=name, dataset_name=name.split("/")[-1], config_name=settings.config, **_LATEST)
    except (OSError, ValueError) as error:
        do = "check the network and HF_HUB_OFFLINE, or run once where there is a network"
        raise _error(settings, f"{what}, and the set is not in the local cache", do) from error
    if settings.revision != builder.hash:
        # The commit of a branch is unknown now, and the library would take the one that was loaded last.
        what += ", so that only a commit in the local cache can be read"
        do = f"check the network, or write revision: {builder.hash}, the one that is there"
        raise _error(settings, what, do, f"revision {settings.revision or 'null'}")
    return builder


def _check_split(settings: DataSource, builder: Any) -> None:
    names = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    if names and settings.split.partition("[")[0] not in names:
        raise _error(settings, "no such split", f"write split: {' or '.join(names)}", settings.split)
    if settings.streaming and "[" in settings.split:
        do = "write streaming: false, or max_rows"
        raise _error(settings, "part of a split cannot be streamed", do, settings.split)


def _error(settings: DataSource, what: str, do: str, got: str | None = None) -> DataError:
    return DataError(Problem(where=str(settings.id), what=what, do=do, got=got))


@contextmanager
def _library_errors(settings: DataSource) -> Iterator[None]:
    """Turn errors of the libraries, a page each, into messages of one line."""
    try:
        yield
    except DataError:
        raise
    except RevisionNotFoundError as error:
        what = "the data set has no such revision"
        raise _error(settings, what, "write a branch, tag or commit of it", settings.revision) from error
    except Exception as error:
        elsewhere = "set HF_HOME to a folder on another disk"
        if problem := disk_problem(error, Path(datasets.config.HF_DATASETS_CACHE), elsewhere=elsewhere):
            raise DiskError(problem) from error
        raise _translated(settings, error) from error


def _translated(settings: DataSource, error: Exception) -> DataError:
    reason = _reason(error)
    if isinstance(error, GatedRepoError) or "is a gated dataset" in reason:
        return _error(settings, "the data set is gated", f"accept its terms on its page, then log in ({_LOG_IN})")
    if isinstance(error, RepositoryNotFoundError):
        do = f"check the name; if the set is private, log in ({_LOG_IN})"
        return _error(settings, "no such data set on the hub", do)
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        names = " or ".join(datasets.get_dataset_config_names(settings.id, revision=settings.revision))
        if settings.config is None:
            return _error(settings, "the data set has several configurations", f"write config: {names}")
        return _error(settings, "no such configuration", f"write config: {names}", settings.config)
    if "scripts are no longer supported" in reason:
        do = "take a version with data files: often revision: refs/convert/parquet"
        return _error(settings, "the data set is a Python script, and scripts are not run", do)
    return _error(settings, "the data set cannot be opened", "check its page on the hub, and the network", reason)


def _reason(error: BaseException) -> str:
    """Kind and first line of the innermost error: the outer ones say that something went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
