"""A tree of `state_dict`s as JSON and named tensors, and back: exactly the same classes and bits.

JSON has no tuples, no integer keys and no infinity, so these stand in objects with one marked key:
`{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`, `{"$float": bits in hex}`, `{"$int": hex}`. Tensors, NumPy's
arrays and its scalars stand beside, by name: `{"$tensor": name}`, `{"$array": name}`, `{"$scalar": name}`.
"""

import math
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from finetune.checkpoint.reader import DISK_DTYPES
from finetune.errors import Problem, RunError

MAX_DEPTH = 32
"""Of containers within containers; the trees of optimizers have six."""
SEQUENCES = (list, tuple, torch.Size)
DICTS = (dict, OrderedDict, defaultdict)  # of one that only extends these it is not known what else it holds

# Written as their bytes: the dtypes that finetune.checkpoint does not read.
_AS_BYTES = {
    str(dtype): dtype
    for dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex64,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    )
}
_ARRAY_DTYPE = re.compile(r"[<>|][biufc]\d{1,2}")


def damaged(file: Path, what: str, got: str) -> RunError:
    """The error for a file of a checkpoint that is not as it was written."""
    do = f"remove {file.parent}: the same command then continues from the checkpoint before it"
    return RunError(Problem(str(file), what, do, got))


def plain_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor without its gradient; RunError for subclasses, such as a rank's shard, and layouts that are not dense.

    Their bytes are not those of the tensor that they stand for.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        got = f"{type(tensor).__qualname__}, {tensor.layout}"
        raise RunError(Problem(where, "holds a tensor that cannot be saved", "use another training.optim", got))
    return tensor.detach()


class TreeEncoder:
    """Turns a tree into JSON's types, and collects its tensors by the path to them: `optimizer.state.0.exp_avg`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors: dict[str, torch.Tensor] = {}
        # The tensor is kept: the number of one that was freed could be that of the next.
        self._names: dict[int, tuple[str, Any]] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        """JSON of a value; exact classes, because one that only extends them would come back as another."""
        if len(path) > MAX_DEPTH:
            raise self._refused(path, f"is more than {MAX_DEPTH} levels deep", type(value))
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind in (int, float):
            return self._number(value)
        if kind in SEQUENCES:
            return self._list(value, path)
        if kind in DICTS:
            return self._dict(value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind is np.ndarray or isinstance(value, np.generic):
            return self._array(value, path)
        raise self._refused(path, "is of a class that cannot be saved", kind)

    def _number(self, value: float) -> Any:
        if isinstance(value, int):
            return value if -(2**63) <= value < 2**64 else {"$int": hex(value)}
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}

    def _list(self, value: "list[Any] | tuple[Any, ...]", path: tuple[str, ...]) -> Any:
        parts = [self.encode(part, (*path, str(index))) for index, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}

    def _dict(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        for key in value:
            if type(key) not in (str, int):
                raise self._refused(path, "has a key that is neither text nor a number", type(key))
        pairs = [(key, self.encode(part, (*path, str(key)))) for key, part in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[self._number(key) if isinstance(key, int) else key, part] for key, part in pairs]}

    def _tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        plain = plain_tensor(value, f"{self.file}: {'.'.join(path)}").cpu().contiguous()
        if plain.dtype in DISK_DTYPES:
            return {"$tensor": self._named(value, plain, path)}
        if str(plain.dtype) not in _AS_BYTES:
            raise self._refused(path, f"has a dtype that cannot be saved: {plain.dtype}", type(value))
        name = self._named(value, plain.reshape(-1).view(torch.uint8), path)
        return {"$tensor": name, "dtype": str(plain.dtype), "shape": list(plain.shape)}

    def _array(self, value: "np.ndarray[Any, Any] | np.generic", path: tuple[str, ...]) -> Any:
        dtype = value.dtype.str
        if _ARRAY_DTYPE.fullmatch(dtype) is None:
            raise self._refused(path, f"has a dtype that cannot be saved: {dtype}", type(value))
        raw = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        name = self._named(value, raw, path)
        if isinstance(value, np.generic):
            return {"$scalar": name, "dtype": dtype, "shape": []}
        return {"$array": name, "dtype": dtype, "shape": list(value.shape)}

    def _named(self, value: Any, stored: torch.Tensor, path: tuple[str, ...]) -> str:
        """The name under which a tensor is stored; the first one's where it occurs twice."""
        if id(value) not in self._names:
            name = ".".join(path)
            while name in self.tensors or name == "__metadata__":
                name += "'"
            self._names[id(value)] = name, value
            self.tensors[name] = stored
        return self._names[id(value)][0]

    def _refused(self, path: tuple[str, ...], what: str, kind: type) -> RunError:
        where = f"{self.file}: {'.'.join(path) or 'the whole'}"
        do = "use another training.optim or training.lr_scheduler_type"
        return RunError(Problem(where, what, do, got=f"{kind.__module__}.{kind.__qualname__}"))


class TreeDecoder:
    """The reverse of `TreeEncoder`; whatever it would not have written is a RunError."""

    def __init__(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.file, self.tensors = file, tensors
        self.used: set[str] = set()
        self._made: dict[str, Any] = {}

    def decode(self, value: Any, depth: int) -> Any:
        """The value that stood for `value`."""
        if depth > 2 * MAX_DEPTH:  # a marked value takes two levels
            raise damaged(self.file, f"is more than {2 * MAX_DEPTH} levels deep", "containers in containers")
        if isinstance(value, list):
            return [self.decode(part, depth + 1) for part in value]
        if not isinstance(value, dict):
            return value
        mark = next((key for key in value if key.startswith("$")), None)
        if mark is None:
            return {key: self.decode(part, depth + 1) for key, part in value.items()}
        try:
            return self._DECODERS[mark](self, value, depth)
        except (KeyError, TypeError, ValueError, RuntimeError, struct.error) as error:
            raise damaged(self.file, "holds a value that this program does not write", ascii(mark)) from error

    def _tuple(self, value: dict[str, Any], depth: int) -> Any:
        return tuple(self.decode(part, depth + 2) for part in value["$tuple"])

    def _dict(self, value: dict[str, Any], depth: int) -> Any:
        return {self.decode(key, depth + 2): self.decode(part, depth + 2) for key, part in value["$dict"]}

    def _int(self, value: dict[str, Any], depth: int) -> Any:
        return int(value["$int"], 16)

    def _float(self, value: dict[str, Any], depth: int) -> Any:
        return struct.unpack(">d", bytes.fromhex(value["$float"]))[0]

    def _tensor(self, value: dict[str, Any], depth: int) -> Any:
        name = value["$tensor"]
        if name not in self.used:
            self.used.add(name)
            tensor = self.tensors[name]
            if "dtype" in value:
                tensor = tensor.view(_AS_BYTES[value["dtype"]]).reshape(value["shape"])
            self._made[name] = tensor
        return self._made[name]

    def _array(self, value: dict[str, Any], depth: int) -> Any:
        name, dtype = value["$array"], value["dtype"]
        if name not in self.used:
            self.used.add(name)
            self._made[name] = self._numpy(name, dtype).reshape(value["shape"])
        return self._made[name]

    def _scalar(self, value: dict[str, Any], depth: int) -> Any:
        self.used.add(value["$scalar"])
        return self._numpy(value["$scalar"], value["dtype"])[0]

    def _numpy(self, name: str, dtype: str) -> Any:
        if _ARRAY_DTYPE.fullmatch(dtype) is None:
            raise ValueError(dtype)
        return np.frombuffer(self.tensors[name].numpy().tobytes(), dtype).copy()

    _DECODERS: ClassVar[dict[str, Callable[["TreeDecoder", dict[str, Any], int], Any]]] = {
        "$tuple": _tuple,
        "$dict": _dict,
        "$int": _int,
        "$float": _float,
        "$tensor": _tensor,
        "$array": _array,
        "$scalar": _scalar,
    }
