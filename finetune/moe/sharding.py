"""A model sharded over processes by torch's FSDP2 (`fully_shard`), its 4-bit weights as flat bytes.

FSDP2 cuts a parameter along its first axis and gathers it in its own dtype, so that the stored tensors of a 4-bit
weight become one frozen uint8 parameter (`gate_up_proj_bytes`), and the weight a view on it, as long as its layer is
gathered. Each decoder layer is gathered for itself, and freed after its forward and backward; gradients of the adapter
are reduced to the process that holds their part, and its optimizer state is as large as that part.

Everything else in the program sees the weights under their own names.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.moe.families import Family
from finetune.moe.forward_check import check_forwards
from finetune.moe.nf4 import Nf4Part, Nf4Stack
from finetune.moe.nf4_loading import is_expert_stack
from finetune.moe.stored_bytes import Share, StackBytes
from finetune.parallelism import Parallelism
from finetune.upstream import clean_name

BYTES = "_bytes"
"""Suffix of a parameter that holds the stored tensors of a 4-bit weight."""


def share_of_this_process(parallelism: Parallelism) -> Share | None:
    """What this process holds of a sharded model; None where each process holds all of it."""
    if not parallelism.is_sharded:
        return None
    return Share(distributed.get_rank() % parallelism.shard, parallelism.shard)


def shard_model(model: torch.nn.Module, family: Family, parallelism: Parallelism) -> None:
    """Shard a model in place: base, adapter, and so the optimizer state made of it.

    Nothing may be added to it or replaced in it afterwards. `model` is what the training calls: with an adapter the
    PeftModel, whose forward does not call the base as a module.
    """
    device = next(parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
    mesh = _mesh(parallelism, device)
    share = share_of_this_process(parallelism)
    assert share is not None
    _synchronise(model)
    flat = [*_flat_stacks(model), *_flatten_linear(model, share)]
    # Correction biases are moved outside of the optimizer, on every process alike.
    kept = set() if family.moe is None else set(_correction_biases(model, family.moe.correction_bias))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for module, name, part in flat:
        _fill(module, name, part)
    check_forwards(model)
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.register_state_dict_post_hook(_gather_state)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(_distribute_state)  # type: ignore[no-untyped-call]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether `shard_model` was called with this model."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, gathered: every process must call it. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a tensor that every process has, what this process holds where it is sharded as `like` is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_layout(model: torch.nn.Module, name: str) -> StackBytes | None:
    """The layout of a parameter of flat bytes by its name in the model; None for any other parameter."""
    path, _, attribute = name.rpartition(".")
    if not attribute.endswith(BYTES):
        return None
    views: dict[str, _View] = getattr(model.get_submodule(path), "flat_views", {})
    view = views.get(attribute.removesuffix(BYTES))
    return None if view is None else view.layout


def _mesh(parallelism: Parallelism, device: torch.device) -> DeviceMesh:
    if parallelism.replicate == 1:
        return init_device_mesh(device.type, (parallelism.shard,))
    shape = (parallelism.replicate, parallelism.shard)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def _synchronise(model: torch.nn.Module) -> None:
    """The adapter, initialised at random, as on the first process."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            distributed.broadcast(parameter.data, src=0)


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, which are also what activation checkpointing recomputes; none within another."""
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    paths = tuple(f"{name}." for name, _ in layers)
    return [module for name, module in layers if not name.startswith(paths)]


def _correction_biases(model: torch.nn.Module, name: str | None) -> Iterator[torch.nn.Parameter]:
    for path, parameter in model.named_parameters():
        if name is not None and clean_name(path).endswith(f".{name}"):
            yield parameter


_Flat = tuple[torch.nn.Module, str, torch.Tensor]
"""A module, the name of its weight, and this process's part of the weight's bytes."""


def _flat_stacks(model: torch.nn.Module) -> Iterator[_Flat]:
    names = [name for name, _ in model.named_parameters() if is_expert_stack(model, name)]
    for path, _, name in (name.rpartition(".") for name in names):
        module = model.get_submodule(path)
        stack = module.get_parameter(name).data
        if isinstance(stack, Nf4Part):  # otherwise in 16 bits: an ordinary parameter
            layout = StackBytes(stack.shape, stack.dtype)
            _register(module, name, _StackView(layout))
            yield module, name, stack.flat


def _flatten_linear(model: torch.nn.Module, share: Share) -> Iterator[_Flat]:
    for module in [module for module in model.modules() if isinstance(module, Linear4bit)]:
        weight: Any = module.weight
        state = weight.quant_state
        layout = StackBytes(torch.Size((1, *state.shape)), state.dtype)
        stored = (weight.data.view(1, -1), state.absmax[None], state.state2.absmax[None], state.offset.reshape(1))
        own = share.of(layout.total)
        part = layout.flatten(stored)[own.start : own.stop].clone()
        _register(module, "weight", _LinearView(layout, state))
        yield module, "weight", part


def _register(module: torch.nn.Module, name: str, view: "_View") -> None:
    """Replace a 4-bit parameter by its bytes, which have no memory yet, and by a property that is a view on them."""
    del module._parameters[name]
    empty = torch.empty(view.layout.total, dtype=torch.uint8, device="meta")
    module.register_parameter(name + BYTES, torch.nn.Parameter(empty, requires_grad=False))
    module.__dict__.setdefault("flat_views", {})[name] = view
    kind = type(module)
    if not hasattr(kind, name):
        attributes = {name: property(_reader(name)), "__module__": kind.__module__}
        module.__class__ = type(kind.__name__, (kind,), attributes)


def _reader(name: str) -> Any:
    def read(module: Any) -> Any:
        return module.flat_views[name].of(module._parameters[name + BYTES])

    return read


class _View:
    """A 4-bit weight in flat bytes; made once for the memory to which FSDP2 gathers a layer again and again."""

    def __init__(self, layout: StackBytes) -> None:
        self.layout = layout
        self._source: torch.Tensor | None = None
        self._made: Any = None

    def of(self, flat: torch.Tensor) -> Any:
        """The weight in the gathered bytes; without values (on the meta device) where they are not gathered."""
        if isinstance(flat, DTensor):
            return self.make(torch.empty(self.layout.total, dtype=torch.uint8, device="meta"))
        if self._source is not flat:
            self._source, self._made = flat, self.make(flat.data)
        return self._made

    def make(self, flat: torch.Tensor) -> Any:
        """The weight in these bytes."""
        raise NotImplementedError


class _StackView(_View):
    def make(self, flat: torch.Tensor) -> Nf4Stack:
        return self.layout.stack(flat)


class _LinearView(_View):
    def __init__(self, layout: StackBytes, state: QuantState) -> None:
        super().__init__(layout)
        # The tables of codes are kept, the tensors of this weight are not.
        self._state = copy.copy(state)
        self._state.state2 = copy.copy(state.state2)
        self._state.absmax = self._state.offset = self._state.state2.absmax = None

    def make(self, flat: torch.Tensor) -> Params4bit:
        packed, absmax, nested, offset = self.layout.views(flat)
        if flat.is_meta:  # bitsandbytes would write the state of each weight into a state dict
            return Params4bit(packed.view(-1, 1), quant_type=self._state.quant_type, bnb_quantized=True)
        state = copy.copy(self._state)
        state.state2 = copy.copy(state.state2)
        state.absmax, state.state2.absmax, state.offset = absmax[0], nested[0], offset[0]
        return Params4bit(packed.view(-1, 1), quant_state=state, quant_type=state.quant_type, bnb_quantized=True)


def _fill(module: torch.nn.Module, name: str, part: torch.Tensor) -> None:
    """Give the sharded bytes their memory."""
    sharded: Any = module.get_parameter(name + BYTES)
    mesh, placements = sharded.device_mesh, sharded.placements
    sizes = {"shape": sharded.shape, "stride": sharded.stride()}
    tensor = DTensor.from_local(part, mesh, placements, run_check=False, **sizes)
    module.register_parameter(name + BYTES, torch.nn.Parameter(tensor, requires_grad=False))


def _gather_state(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """State dict hook: the adapter's tensors as a whole, as PEFT writes them."""
    for name, _ in module.named_parameters(recurse=False):
        if isinstance(state.get(prefix + name), DTensor):
            state[prefix + name] = whole(state[prefix + name].detach())


def _distribute_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the part of this process of each tensor of an adapter."""
    for name, parameter in module.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = part_of(state[prefix + name], parameter)
