"""NF4 on disk: a checkpoint whose linear layers and expert stacks were quantised before, and load as they are.

A linear layer lies there as bitsandbytes serialises it (`weight`, `weight.absmax`, ...), a stack `[E, O, I]` as the
four tensors of `Nf4Stack`, below the stack's name in the loaded model; everything else as in the published checkpoint.

E experts, N bytes and Q blocks of one matrix, S = Q / 256.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from finetune.checkpoint import TensorInfo, TensorSpec
from finetune.checkpoint.dtypes import DISK_DTYPES
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.moe.families import family_of
from finetune.moe.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, Nf4Stack
from finetune.moe.nf4_reader import Extent, Matrix, Nf4Reader
from finetune.moe.quantized import quantized_weights
from finetune.moe.quantizer import LINEAR_PARTS, QUANT_METHOD, STACK_PARTS

FORMAT = 1
STATE_BYTES = 256  # of the JSON that bitsandbytes keeps beside a matrix; the rest is white space
_STATE = {
    "quant_type": "nf4",
    "blocksize": BLOCKSIZE,
    "nested_blocksize": NESTED_BLOCKSIZE,
    "nested_dtype": "float32",
}
_AGAIN = "write the folder again with finetune merge --requantize nf4"


def quantization_config() -> dict[str, Any]:
    """What `config.json` says of such a checkpoint. No `load_in_4bit`: transformers takes that for linear layers."""
    return {"quant_method": QUANT_METHOD, "format": FORMAT}


def is_stored(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of such a checkpoint."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def stored_specs(weight: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """The tensors on disk of one weight of the loaded model: `[O, I]` of a linear layer, `[E, O, I]` of a stack."""
    experts, values = (shape[0] if len(shape) == 3 else 1), shape[-2] * shape[-1]
    N, Q = -(-values // 2), -(-values // BLOCKSIZE)
    S = -(-Q // NESTED_BLOCKSIZE)
    if len(shape) == 3:
        of_stack = (("U8", (experts, N)), ("U8", (experts, Q)), ("F32", (experts, S)), ("F32", (experts,)))
        return [TensorSpec(weight + name, *spec) for name, spec in zip(STACK_PARTS, of_stack, strict=True)]
    codes = (("F32", (16,)), ("F32", (256,)))
    of_layer = (("U8", (N, 1)), ("U8", (Q,)), ("F32", (S,)), *codes, ("U8", (STATE_BYTES,)))
    return [TensorSpec(weight + name, *spec) for name, spec in zip(LINEAR_PARTS, of_layer, strict=True)]


def linear_tensors(weight: str, matrix: Nf4Stack, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is written of a linear layer, which is given as a stack of one; `dtype` that of the 16-bit checkpoint."""
    state = {
        **_STATE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(matrix.shape[1:]),
        "nested_offset": matrix.offset_E.item(),
    }
    text = json.dumps(state).ljust(STATE_BYTES).encode("utf-8")
    code, nested_code = _codes()
    values = (
        matrix.packed_EN[0].view(-1, 1),
        matrix.absmax_EQ[0],
        matrix.nested_absmax_ES[0],
        code,
        nested_code,
        torch.frombuffer(bytearray(text), dtype=torch.uint8),
    )
    return {weight + name: value for name, value in zip(LINEAR_PARTS, values, strict=True)}


@cache
def _codes() -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 values of NF4 and the 256 of a block maximum."""
    return get_4bit_type("nf4", device="cpu"), create_dynamic_map()


class StoredReader(Nf4Reader):
    """Such a checkpoint, seen as the 16-bit checkpoint that its NF4 weights stand for, under the published names.

    Their number format is the one that `config.json` names; values come in `dtype`, by default the same. Raises
    WeightsError, with every problem at once, for weights in NF4 that are not there as the architecture needs them.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        super().__init__(folder)
        self._named_dtype: torch.dtype = getattr(torch, str(self.config.get("dtype") or self.config.get("torch_dtype")))
        self.dtype = dtype or self._named_dtype
        weights = quantized_weights(self.config)
        shapes = {**weights.linear, **weights.stacks}
        problems = [problem for name, shape in shapes.items() for problem in self._problems(name, shape)]
        if problems:
            raise WeightsError(problems)
        self._stored, self._shapes = self._infos, shapes
        self._offsets = self._read_offsets(weights.linear)
        parts = {spec.key for name, shape in shapes.items() for spec in stored_specs(name, shape)}
        self._infos = {key: info for key, info in self._stored.items() if key not in parts}
        matrices = [matrix for name, shape in shapes.items() for matrix in self._matrices(name, shape)]
        for matrix in matrices:
            for extent in matrix.parts:
                whole = shapes[matrix.weight] if extent.key == matrix.weight else (extent.rows, matrix.columns)
                self._infos[extent.key] = self._as_16_bits(extent.key, matrix.weight, whole)
        self.keys = list(self._infos)
        self._hold(matrices)
        self._by_weight = {(matrix.weight, matrix.expert): matrix for matrix in matrices}

    def matrix(self, weight: str, expert: int) -> Matrix:
        """The place of one matrix of a weight of the loaded model; `expert` is 0 of a linear layer."""
        return self._by_weight[weight, expert]

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of the folder, without what it says of NF4."""
        return {key: value for key, value in super().config.items() if key != "quantization_config"}

    def fetch(self, matrix: Matrix) -> Nf4Stack:
        """Read what is stored of one matrix."""
        names = LINEAR_PARTS if matrix.weight in self._offsets else STACK_PARTS
        infos = [self._stored[matrix.weight + name] for name in names]
        if matrix.weight in self._offsets:
            packed, absmax, nested = (read_tensor(info).view(1, -1) for info in infos[:3])
            offset = torch.tensor([self._offsets[matrix.weight]])
        else:
            one = slice(matrix.expert, matrix.expert + 1)
            packed, absmax, nested, offset = (read_tensor(info, one.start, one.stop) for info in infos)
        return Nf4Stack((packed, absmax, nested, offset), torch.Size((1, matrix.rows, matrix.columns)), self.dtype)

    def _matrices(self, name: str, shape: tuple[int, ...]) -> Iterator[Matrix]:
        """Those of one weight, under the names that published checkpoints have for them."""
        published = self._published(name)
        for expert in range(shape[0] if len(shape) == 3 else 1):
            keys = [key.format(expert=expert) for key in published]
            if keys:
                rows = shape[-2] // len(keys)
                extents = tuple(Extent(key, 0, rows) for key in keys)
            else:
                extents = (Extent(name, expert * shape[-2], shape[-2]),)
            yield Matrix(name, expert, extents, shape[-1])

    def _published(self, name: str) -> list[str]:
        """How a checkpoint with one tensor an expert calls the matrices of a stack, with {expert}; else empty."""
        moe = family_of(str(self.config["model_type"]), str(self.folder)).moe
        if moe is None or not moe.per_expert:
            return []
        for stack in moe.stacks:
            prefix = name.removesuffix(f"{moe.experts_module}.{stack.parameter}")
            if prefix != name:
                return [prefix + moe.disk_expert.format(expert="{expert}", name=each) for each in stack.disk_names]
        return []

    def _as_16_bits(self, key: str, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """Lies nowhere: past the end of its file, so that whoever reads there without this reader finds nothing."""
        parts = (name + STACK_PARTS[0], name + LINEAR_PARTS[0])
        part = self._stored[next(each for each in parts if each in self._stored)]
        nbytes = torch.Size(shape).numel() * self._named_dtype.itemsize
        past, dtype = part.file.stat().st_size, DISK_DTYPES[self._named_dtype]
        return replace(part, key=key, dtype=dtype, shape=shape, offset=past, nbytes=nbytes)

    def _problems(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        """Parts of one weight that are missing, of another shape or in another number format."""
        problems = []
        for spec in stored_specs(name, shape):
            if not self.holds(spec.key):
                what = "the checkpoint has no such tensor; the weight is stored in NF4"
                problems.append(Problem(f"{self.folder}: {spec.key}", what, _AGAIN))
            elif ((info := self.info(spec.key)).dtype, info.shape) != (spec.dtype, spec.shape):
                what = f"must be {spec.dtype}{list(spec.shape)}"
                problems.append(Problem(f"{info.file}: {spec.key}", what, _AGAIN, f"{info.dtype}{list(info.shape)}"))
        return problems

    def _read_offsets(self, linear: dict[str, tuple[int, ...]]) -> dict[str, float]:
        """The mean of the block maxima of each linear layer; refused where bitsandbytes was told another format."""
        offsets, problems = {}, []
        for name, shape in linear.items():
            info = self._stored[name + LINEAR_PARTS[-1]]
            try:
                state = json.loads(bytes(read_tensor(info).numpy()))
                offsets[name] = float(state.pop("nested_offset"))
            except (ValueError, KeyError, AttributeError) as error:
                what = "is not what bitsandbytes keeps beside a matrix"
                problems.append(Problem(f"{info.file}: {info.key}", what, _AGAIN, str(error)))
                continue
            wanted = {**_STATE, "dtype": state.get("dtype"), "shape": list(shape)}
            if state != wanted:
                problems.append(Problem(f"{info.file}: {info.key}", "another format", _AGAIN, str(state)))
        if problems:
            raise WeightsError(problems)
        return offsets
