"""Adapters of chosen experts: in memory only their factors, on disk a complete stock PEFT adapter.

Other experts have no factors in memory: no parameters, gradients or optimizer state. A state dict has PEFT's full
matrices with zeros for them, so saving, loading, resuming and merging work unchanged.

E experts, S chosen experts, r rank. Full: `lora_A [E*r, in]` is expert-major, `lora_B [out, r*E]` rank-major. Compact:
`lora_A [S*r, in]` and `lora_B [out, r*S]`, in the same orders.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from finetune.errors import Problem, WeightsError
from finetune.moe.audit import clean_name
from finetune.moe.lora import FactoredStackLora


def keep_chosen(model: torch.nn.Module, chosen: Mapping[str, tuple[int, ...]]) -> None:
    """Drop the factors of all experts but the chosen ones; `chosen`: decoder layer's path -> ascending experts.

    Called on a fresh adapter, before an optimizer exists. Raises WeightsError if model and choice differ in
    their layers, or an expert does not exist.
    """
    adapted_layers: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, FactoredStackLora):
            continue
        layer = next((layer for layer in chosen if clean_name(name).startswith(f"{layer}.")), None)
        if layer is None or max(chosen[layer]) >= module.num_experts:
            raise _other_model(clean_name(name), f"experts of {', '.join(chosen)}")
        adapted_layers.add(layer)
        for adapter in module.lora_A:
            _compact(module, adapter, chosen[layer])
    if missing := sorted(set(chosen) - adapted_layers):
        raise _other_model(missing[0], "no adapted experts there")


def _other_model(where: str, got: str) -> WeightsError:
    do = "start anew in another output_dir, so that the experts are measured on this model"
    return WeightsError(Problem(where, "the choice of experts was made for another model", do, got=got))


def _compact(wrapper: Any, adapter: str, experts: tuple[int, ...]) -> None:
    full, rank = wrapper.num_experts, wrapper.r[adapter]
    if len(experts) == full:
        return
    grid_Er = torch.arange(full * rank).reshape(full, rank)
    grid_rE = torch.arange(full * rank).reshape(rank, full)
    chosen = torch.tensor(experts)
    for linear, dim, index in (
        (wrapper.lora_A[adapter], 0, grid_Er[chosen].reshape(-1)),
        (wrapper.lora_B[adapter], 1, grid_rE[:, chosen].reshape(-1)),
    ):
        layout = _Layout(dim, index, full * rank)
        linear.weight = torch.nn.Parameter(layout.compact(linear.weight.detach()).clone(), linear.weight.requires_grad)
        linear.out_features, linear.in_features = linear.weight.shape
        # torch sets an attribute on the hook, which bound methods do not allow.
        linear.register_state_dict_post_hook(partial(layout.save))
        linear.register_load_state_dict_pre_hook(partial(layout.load))
    wrapper.chosen = {**wrapper.chosen, adapter: experts}


@dataclass(frozen=True)
class _Layout:
    """Positions of one factor's compact slices in the full matrix: along `dim`, at `index`, of `size` in total."""

    dim: int
    index: torch.Tensor
    size: int

    def compact(self, full: torch.Tensor) -> torch.Tensor:
        return full.index_select(self.dim, self.index.to(full.device))

    def expand(self, compact: torch.Tensor) -> torch.Tensor:
        shape = list(compact.shape)
        shape[self.dim] = self.size
        return compact.new_zeros(shape).index_copy_(self.dim, self.index.to(compact.device), compact)

    def save(self, _module: Any, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
        """State dict hook: expand the weight in `state_dict`."""
        state_dict[f"{prefix}weight"] = self.expand(state_dict[f"{prefix}weight"].detach())

    def load(self, _module: Any, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        """Load hook: compact the weight in `state_dict`; torch reports a weight of another shape."""
        full = state_dict.get(f"{prefix}weight")
        if full is None or full.shape[self.dim] != self.size:
            return
        compact = self.compact(full)
        if full.count_nonzero() != compact.count_nonzero():
            raise WeightsError(
                Problem(
                    f"{prefix}weight",
                    "the adapter changes experts that this run does not adapt",
                    "continue the run with the experts.json that it was made with, or start anew in another output_dir",
                )
            )
        state_dict[f"{prefix}weight"] = compact
