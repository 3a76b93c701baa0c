"""Write a safetensors checkpoint as a stream: headers first, then tensors or rows of tensors in any order."""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType

import torch

from finetune.checkpoint.reader import DISK_DTYPES, INDEX_FILE, SINGLE_FILE, TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.files import disk_named, write_json

DEFAULT_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to be written; `dtype` as in safetensors ("BF16")."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


@dataclass
class _Slot:
    """Position of a tensor, and how many of its bytes have been written."""

    spec: TensorSpec
    shard: int
    offset: int
    written: int = 0


class CheckpointWriter:
    """Streams tensors into `folder`; a single shard is called `model.safetensors`, several get an index.

    A context manager: leaving it without an exception calls `close`. Raises WeightsError for a tensor that was not
    announced, differs from its announcement, or is written twice or not at all.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> None:
        """`wait`: `close` returns when everything is on the disk (fsync); without it the caller sees to that."""
        self.folder, self._wait = Path(folder), wait
        self.folder.mkdir(parents=True, exist_ok=True)
        if len({spec.key for spec in specs}) != len(specs):
            raise WeightsError(Problem(str(folder), "a tensor is announced twice", "give every key once"))
        shards = _plan(specs, max_shard_bytes)
        self.files = [self.folder / name for name in _shard_names(len(shards))]
        self._slots: dict[str, _Slot] = {}
        self._descriptors: list[int] = []
        self._locks: list[Lock] = []
        for number, (file, shard) in enumerate(zip(self.files, shards, strict=True)):
            self._begin_shard(number, file, shard, metadata or {"format": "pt"})

    def _begin_shard(self, number: int, file: Path, shard: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset = 0
        for spec in shard:
            header[spec.key] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            self._slots[spec.key] = _Slot(spec, number, offset)
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        for spec in shard:
            self._slots[spec.key].offset += 8 + len(text)
        begin = len(text).to_bytes(8, "little") + text
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        self._locks.append(Lock())
        _write_at(descriptor, 0, memoryview(begin))
        _reserve(file, descriptor, 8 + len(text) + offset)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor; its dtype and shape must be the announced ones."""
        slot = self._slot(key, tensor)
        if tuple(tensor.shape) != slot.spec.shape:
            got = str(list(tensor.shape))
            raise WeightsError(
                Problem(key, "shape differs from the announced one", f"write {list(slot.spec.shape)}", got)
            )
        self._put(slot, slot.offset, tensor)

    def write_rows(self, key: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of a tensor from row `start` on, each once; a tensor without axes is one row.

        All axes but the last are merged: a stack of matrices is their rows, one after another.
        """
        slot = self._slot(key, rows)
        shape = slot.spec.shape
        if not shape:
            self.write(key, rows)
            return
        if len(shape) > 2:
            shape = (math.prod(shape[:-1]), shape[-1])
        if tuple(rows.shape[1:]) != shape[1:] or start + rows.shape[0] > shape[0]:
            got = f"{list(rows.shape)} at row {start}"
            raise WeightsError(Problem(key, "rows do not fit the announced shape", f"write rows of {list(shape)}", got))
        self._put(slot, slot.offset + start * (slot.spec.nbytes // max(shape[0], 1)), rows)

    def _slot(self, key: str, tensor: torch.Tensor) -> _Slot:
        if key not in self._slots:
            raise WeightsError(Problem(key, "tensor was not announced", "add it to the specs"))
        slot = self._slots[key]
        if DISK_DTYPES.get(tensor.dtype) != slot.spec.dtype:
            raise WeightsError(
                Problem(key, "dtype differs from the announced one", f"write {slot.spec.dtype}", str(tensor.dtype))
            )
        return slot

    def _put(self, slot: _Slot, offset: int, tensor: torch.Tensor) -> None:
        raw_B = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if slot.written + raw_B.numel() > slot.spec.nbytes:
            raise WeightsError(Problem(slot.spec.key, "tensor is written twice", "write each tensor once"))
        # The kernel allows one writer per file at a time; the others would spin.
        with self._locks[slot.shard]:
            _write_at(self._descriptors[slot.shard], offset, raw_B.numpy().data)
        slot.written += raw_B.numel()

    def close(self) -> None:
        """Check that everything arrived, flush to disk, write the index."""
        missing = [slot.spec.key for slot in self._slots.values() if slot.written != slot.spec.nbytes]
        if missing:
            self.abort()
            got = ", ".join(missing[:3])
            raise WeightsError(
                Problem(str(self.folder), f"{len(missing)} tensors were not written", "write them all", got)
            )
        for descriptor in self._descriptors if self._wait else ():
            os.fsync(descriptor)
        self.abort()
        if len(self.files) > 1:
            self._write_index()

    def abort(self) -> None:
        """Close the files without any check. Unless `close` came first, the folder holds no usable checkpoint."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _write_index(self) -> None:
        slots = self._slots.values()
        index = {
            "metadata": {"total_size": sum(slot.spec.nbytes for slot in slots)},
            "weight_map": {slot.spec.key: self.files[slot.shard].name for slot in slots},
        }
        write_json(self.folder / INDEX_FILE, index)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def _plan(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Split the specs into shards, in order; within a shard wide dtypes come first so that all are aligned."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return [sorted(shard, key=lambda spec: -TORCH_DTYPES[spec.dtype].itemsize) for shard in shards]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _reserve(file: Path, descriptor: int, nbytes: int) -> None:
    """Take the file's whole space on disk now: a disk that others fill meanwhile cannot stop the stream half-way."""
    try:
        with disk_named(file, nbytes):
            os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot reserve
            raise


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:  # one call writes at most 2 GiB
        count = os.pwrite(descriptor, data, offset)
        offset, data = offset + count, data[count:]
