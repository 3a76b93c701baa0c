"""What a continued run needs besides its weights, on disk without pickle: tensors as safetensors, the rest as JSON.

`training_state.json` holds the tree of `state_dict`s as `finetune.methods.state_tree` writes it, and in its first line
the checksums of both files, which are compared before anything is read. The same tree gives the same bytes.
"""

import json
import random
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.checkpoint.reader import DISK_DTYPES, read_header, read_tensor
from finetune.errors import FinetuneError, Problem, RunError
from finetune.methods.state_tree import DICTS, SEQUENCES, TreeDecoder, TreeEncoder, damaged, plain_tensor

TREE_FILE = "training_state.json"
TENSORS_FILE = "training_state.safetensors"
STATE_FILES = (TREE_FILE, TENSORS_FILE)

MAX_JSON_BYTES = 32 * 2**20
"""Of `training_state.json`, and of the header of `training_state.safetensors`: ten times that of 100,000 parameters."""

_FIRST_LINE = re.compile(rb'\{"format": 1, "tensors_crc32": (\d{1,10}), "tree_crc32": (\d{1,10}), "tree":\n')
_LAST_LINE = b"\n}\n"
_CHUNK_BYTES = 2**20


def snapshot(tree: Any) -> Any:
    """A copy of the tree whose tensors are on the CPU and shared with nothing; one used twice stays one."""
    copies: dict[int, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in copies:
                copies[id(value)] = plain_tensor(value, "a snapshot").to("cpu", copy=True).contiguous()
            return copies[id(value)]
        if type(value) in DICTS:
            return {key: copied(part) for key, part in value.items()}
        if type(value) in SEQUENCES:
            parts = map(copied, value)
            return list(parts) if isinstance(value, list) else tuple(parts)
        return value.copy() if isinstance(value, np.ndarray) else value

    return copied(tree)


def write_state(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write the two files. RunError for a value of a class that cannot be read back as what it was."""
    encoder = TreeEncoder(folder / TREE_FILE)
    encoded = encoder.encode(tree, ())
    text = json.dumps(encoded, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
    if len(text) > MAX_JSON_BYTES:
        do = "report this: it is ten times what 100,000 parameters need"
        raise RunError(Problem(str(folder / TREE_FILE), "would be too large", do, got=f"{len(text)} bytes"))
    tensors_crc32 = _write_tensors(folder / TENSORS_FILE, encoder.tensors)
    sums = f'{{"format": 1, "tensors_crc32": {tensors_crc32}, "tree_crc32": {zlib.crc32(text)}, "tree":\n'
    (folder / TREE_FILE).write_bytes(sums.encode("ascii") + text + _LAST_LINE)


def read_state(folder: Path) -> dict[str, Any]:
    """The tree that `write_state` was given. RunError with the file's name for anything else than its two files."""
    tree_file, tensors_file = folder / TREE_FILE, folder / TENSORS_FILE
    text, tensors_crc32 = _read_tree_text(tree_file)
    tensors = _read_tensors(tensors_file, tensors_crc32)
    try:
        encoded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(tree_file, "is not JSON", str(error)) from error
    decoder = TreeDecoder(tree_file, tensors)
    tree = decoder.decode(encoded, 0)
    if not isinstance(tree, dict):
        raise damaged(tree_file, "holds no mapping", type(tree).__name__)
    if unused := tensors.keys() - decoder.used:
        raise damaged(tensors_file, f"holds tensors that {TREE_FILE} does not name", sorted(unused)[0])
    return tree


def rng_state() -> dict[str, Any]:
    """The random generators of Python, NumPy, and torch on the CPU and on each GPU."""
    version, internal, gauss = random.getstate()
    return {
        "python": {"version": version, "internal": np.array(internal, np.uint32), "gauss": gauss},
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continue the generators where `rng_state` saw them; RunError for anything else than what it returns.

    A GPU that was not there then keeps its own generator.
    """
    try:
        python = state["python"]
        random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
        numpy = state["numpy"]
        if not 0 <= numpy["state"]["pos"] <= len(numpy["state"]["key"]):  # NumPy would read beyond its memory
            raise ValueError("the position is outside of NumPy's state")
        np.random.set_state(numpy)
        torch.set_rng_state(state["torch"])
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        what = "is not the state of this version's random generators"
        do = "continue with the versions of Python, NumPy and torch that wrote the checkpoint"
        raise RunError(Problem("random generators", what, do, got=str(error).split("\n")[0])) from error


def _write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write a safetensors file as a stream, wide dtypes first so that all are aligned; returns its CRC-32."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.itemsize
        shape = list(tensor.shape)
        header[name] = {"dtype": DISK_DTYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    crc32 = zlib.crc32(begin)
    with file.open("wb") as stream:
        stream.write(begin)
        for _, tensor in ordered:
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            crc32 = zlib.crc32(data, crc32)
            stream.write(data)
    return crc32


def _size(file: Path, least: int) -> int:
    """The file's bytes; RunError where it is missing, no regular file, or empty."""
    try:
        if not file.is_file():
            raise damaged(file, "is no file", "a folder or a device" if file.exists() else "nothing")
        size = file.stat().st_size
    except OSError as error:
        raise damaged(file, "cannot be read", error.strerror or str(error)) from error
    if size < least:
        raise damaged(file, "is cut off", f"{size} bytes")
    return size


def _read_tree_text(file: Path) -> tuple[bytes, int]:
    """The tree's JSON, compared with its checksum, and the checksum of the other file."""
    if _size(file, 1) > MAX_JSON_BYTES + 200:
        raise damaged(file, f"has more than {MAX_JSON_BYTES} bytes", f"{file.stat().st_size} bytes")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise damaged(file, "cannot be read", error.strerror or str(error)) from error
    first = _FIRST_LINE.match(content)
    if first is None:
        raise damaged(file, "does not begin as this program writes it", ascii(content[:40]))
    text = content[first.end() :].removesuffix(_LAST_LINE)
    if not content.endswith(_LAST_LINE) or zlib.crc32(text) != int(first[2]):
        raise damaged(file, "differs from its checksum", f"{len(content)} bytes")
    return text, int(first[1])


def _read_tensors(file: Path, crc32: int) -> dict[str, torch.Tensor]:
    size, found = _size(file, 8), 0
    try:
        with file.open("rb", buffering=0) as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            while chunk := stream.read(_CHUNK_BYTES):
                found = zlib.crc32(chunk, found)
    except OSError as error:
        raise damaged(file, "cannot be read", error.strerror or str(error)) from error
    if found != crc32:
        raise damaged(file, f"differs from its checksum in {TREE_FILE}", f"{size} bytes")
    if header_bytes > MAX_JSON_BYTES:
        raise damaged(file, f"has a header of more than {MAX_JSON_BYTES} bytes", f"{header_bytes} bytes")
    try:
        return {name: read_tensor(info) for name, info in read_header(file).items()}
    except (FinetuneError, OSError, RuntimeError, TypeError, ValueError) as error:  # the last three are torch's
        raise damaged(file, "cannot be read as safetensors", str(error).split("\n")[0]) from error
