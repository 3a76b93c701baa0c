"""Read a safetensors checkpoint (one file, or shards with an index) tensor by tensor with plain file reads."""

import math
import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem, WeightsError
from finetune.files import open_regular, parse_json
from finetune.model_files import FETCH_AGAIN, first_line, read_config, read_object

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DISK_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 1 << 25  # a third of the limit of the safetensors library: 200,000 tensors in one file
_MAX_AXES, _MAX_NUMBER = 8, 2**48
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # files that need pickle


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor: `dtype` as in safetensors ("BF16"), `offset` in bytes from the start of `file`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def as_rows(self) -> "TensorInfo":
        """The same bytes with all axes but the last merged: a stack of matrices becomes one matrix of all rows."""
        if len(self.shape) < 3:
            return self
        return replace(self, shape=(math.prod(self.shape[:-1]), self.shape[-1]))


def pickles_in(folder: Path) -> list[str]:
    """Names of pickle files, which are never opened here."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)


read_json = read_object


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, in file order; each is checked to lie inside the file."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise WeightsError(
                    Problem(str(file), "header is truncated or not safetensors", FETCH_AGAIN, f"{size} bytes")
                )
            header = parse_json(stream.read(length))
    except (OSError, ValueError, MemoryError) as error:
        raise WeightsError(Problem(str(file), "header cannot be read", FETCH_AGAIN, first_line(error))) from error
    if not isinstance(header, dict):
        raise WeightsError(Problem(str(file), "header is not a JSON object", FETCH_AGAIN))
    header.pop("__metadata__", None)
    infos = [_entry(file, key, value, 8 + length, size) for key, value in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    for before, info in pairwise(infos):
        if before.offset + before.nbytes > info.offset:
            raise WeightsError(Problem(f"{file}: {info.key}", f"overlaps {before.key}", FETCH_AGAIN))
    return {info.key: info for info in infos}


def _entry(file: Path, key: str, value: Any, start: int, file_size: int) -> TensorInfo:
    where = f"{file}: {key}"
    try:
        dtype, shape = str(value["dtype"]), tuple(value["shape"])
        begin, end = value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(Problem(where, "malformed header entry", FETCH_AGAIN, got=str(value)[:200])) from error
    if len(shape) > _MAX_AXES or not all(type(n) is int and abs(n) < _MAX_NUMBER for n in (*shape, begin, end)):
        raise WeightsError(Problem(where, "malformed header entry", FETCH_AGAIN, got=str(value)[:200]))
    if dtype not in TORCH_DTYPES:
        known = ", ".join(TORCH_DTYPES)
        raise WeightsError(Problem(where, "unsupported dtype", f"use a checkpoint in one of {known}", got=dtype))
    expected = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != expected:
        raise WeightsError(
            Problem(where, "bytes do not fit the shape", FETCH_AGAIN, f"{end - begin} bytes for {dtype}{list(shape)}")
        )
    if start + end > file_size:
        raise WeightsError(
            Problem(where, "file is truncated", FETCH_AGAIN, f"{file_size} bytes where {start + end} are needed")
        )
    return TensorInfo(key, dtype, shape, file, start + begin, end - begin)


def read_tensor(info: TensorInfo, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows `start:stop` of a tensor (all by default), read into new memory, without mmap."""
    dtype = TORCH_DTYPES[info.dtype]
    shape, offset = info.shape, info.offset
    if shape:
        start, stop, _ = slice(start, stop).indices(shape[0])
        row_bytes = info.nbytes // shape[0] if shape[0] else 0
        shape, offset = (max(stop - start, 0), *shape[1:]), offset + start * row_bytes
    raw_B = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    view = raw_B.numpy().data
    with open_regular(info.file) as stream:
        stream.seek(offset)
        while view:  # one read call returns at most 2 GiB
            count = stream.readinto(view)
            if not count:
                raise WeightsError(Problem(f"{info.file}: {info.key}", "file ended while reading", FETCH_AGAIN))
            view = view[count:]
    return raw_B.view(dtype).reshape(shape)


class CheckpointReader:
    """The tensors of a Hugging Face checkpoint folder, by key, in file order.

    Takes `model.safetensors` before an index, as transformers does. Raises WeightsError for anything but safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if (self.folder / SINGLE_FILE).is_file():
            self._infos = read_header(self.folder / SINGLE_FILE)
        elif (self.folder / INDEX_FILE).is_file():
            self._infos = self._read_index()
        else:
            raise WeightsError(self._no_weights())
        self.keys: list[str] = list(self._infos)

    def _no_weights(self) -> Problem:
        where = str(self.folder)
        if not self.folder.is_dir():
            return Problem(where, "is not a folder", "give the folder that holds config.json and the weights")
        if pickles := pickles_in(self.folder):
            do = "convert the checkpoint to safetensors: pickle files can run code and are never opened here"
            return Problem(where, "holds no safetensors weights", do, got=", ".join(pickles[:3]))
        return Problem(where, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}", "give the folder that holds the weights")

    def _read_index(self) -> dict[str, TensorInfo]:
        index = self.folder / INDEX_FILE
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(Problem(str(index), "has no weight_map", FETCH_AGAIN))
        infos: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        for name in sorted(set(map(str, weight_map.values()))):
            expected = [key for key, file in weight_map.items() if file == name]
            # The index is untrusted: only plain file names are allowed.
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                do = "shards must be .safetensors files in the same folder"
                problems.append(Problem(str(index), "names a shard outside the folder or of another kind", do, name))
                continue
            if not (self.folder / name).is_file():
                problems.append(Problem(str(self.folder / name), "shard is missing", FETCH_AGAIN))
                continue
            header = read_header(self.folder / name)
            problems += [
                Problem(str(self.folder / name), "lacks a tensor that the index lists", FETCH_AGAIN, key)
                for key in expected
                if key not in header
            ]
            infos |= {key: info for key, info in header.items() if key in expected}
        if problems:
            raise WeightsError(problems)
        return infos

    def info(self, key: str) -> TensorInfo:
        """Location of `key`; WeightsError if the checkpoint has no such tensor."""
        if key not in self._infos:
            raise WeightsError(
                Problem(str(self.folder), "has no such tensor", "check the checkpoint's architecture", key)
            )
        return self._infos[key]

    def holds(self, key: str) -> bool:
        """True if the checkpoint has a tensor of this name."""
        return key in self._infos

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor in its own dtype."""
        return read_tensor(self.info(key))

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` (of all axes but the last, as one), without reading the others."""
        return read_tensor(self.info(key).as_rows(), start, stop)

    @property
    def quantized(self) -> frozenset[str]:
        """Names of the tensors that read as what their NF4 stands for; none of a plain checkpoint."""
        return frozenset()

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of the folder, validated."""
        return read_config(self.folder)
