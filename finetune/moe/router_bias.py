"""Balancing without a loss: the correction bias that some routers add to their scores to choose experts.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; 2408.15664): after each optimizer step the bias of an expert that got
fewer tokens than the mean goes up by a fixed rate and that of one that got more goes down. Every architecture
with this bias adds it to the scores (sigmoid or softmax) before `topk`: an expert with a higher bias is chosen more
often, however the weights of the chosen experts are normalised. It has no gradient. A PEFT adapter cannot hold it, so
it is saved in a file of its own.

E experts, L MoE layers.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from finetune.errors import Problem, RecipeError, WeightsError
from finetune.moe.families import Family, MoeLayout
from finetune.upstream import clean_name

BIAS_FILE = "router_bias.safetensors"


def find_biases(model: torch.nn.Module, moe: MoeLayout) -> dict[str, torch.Tensor]:
    """The correction bias of each MoE layer by its name in transformers' model, in order; empty where there is none.

    They are float32 afterwards: in 16 bits a step of 0.001 would be lost on a bias of 1.
    """
    biases = {}
    for name, (module, attribute) in _places(model, moe).items():
        biases[name] = getattr(module, attribute)
        biases[name].data = biases[name].data.float()
    return biases


def _places(model: torch.nn.Module, moe: MoeLayout) -> dict[str, tuple[torch.nn.Module, str]]:
    """Module and attribute of each bias by its name. A buffer is another tensor after `model.to(...)`."""
    places = {}
    for name in [name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named]:
        if moe.correction_bias is not None and clean_name(name).endswith(f".{moe.correction_bias}"):
            path, _, attribute = name.rpartition(".")
            places[clean_name(name)] = (model.get_submodule(path), attribute)
    return places


def require_biases(family: Family, rate: float) -> MoeLayout:
    """The layout of an architecture whose routers carry the bias; RecipeError for others."""
    if family.moe is None or family.moe.correction_bias is None:
        raise RecipeError(
            Problem(
                "router.bias_update_rate",
                f"the routers of {family.model_type} carry no correction bias that could be moved",
                "write 0, and a router.router_aux_loss_coef to balance by a loss",
                got=str(rate),
            )
        )
    return family.moe


class BiasBalance:
    """Updates the correction biases of one model after each optimizer step. No host sync."""

    def __init__(self, model: torch.nn.Module, family: Family, rate: float) -> None:
        moe = require_biases(family, rate)
        self.rate = rate
        self._places = _places(model, moe)
        self.base = [bias.detach().clone() for bias in find_biases(model, moe).values()]

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """The biases as the model has them now, by name."""
        return {name: getattr(module, attribute) for name, (module, attribute) in self._places.items()}

    def end_step(self, count_LE: torch.Tensor) -> None:
        """Move each bias by the rate towards the mean load; `count_LE` from all ranks and micro-batches of the step."""
        step_LE = self.rate * torch.sign(count_LE.mean(-1, keepdim=True) - count_LE)
        with torch.no_grad():
            for bias, step_E in zip(self.biases.values(), step_LE, strict=True):
                bias.add_(step_E.view_as(bias))

    @contextmanager
    def as_base(self, position: int) -> Iterator[None]:
        """Within the block the router at this position has the base model's bias."""
        bias = list(self.biases.values())[position]
        ours, bias.data = bias.data, self.base[position].to(bias.device)
        try:
            yield
        finally:
            bias.data = ours

    @contextmanager
    def all_as_base(self) -> Iterator[None]:
        """Within the block every router has the base model's bias."""
        with ExitStack() as stack:
            for position in range(len(self.base)):
                stack.enter_context(self.as_base(position))
            yield

    def state_dict(self) -> dict[str, list[Any]]:
        """Name -> values, as plain numbers (JSON)."""
        return {name: bias.tolist() for name, bias in self.biases.items()}

    def load_state_dict(self, state: Mapping[str, list[Any]], where: str) -> None:
        """Continue from `state_dict()`, read from the file `where`."""
        copy_biases(self.biases, {name: torch.tensor(values) for name, values in state.items()}, where)


def load_biases(model: torch.nn.Module, moe: MoeLayout, folder: Path) -> None:
    """Load the biases saved with an adapter, if any, into the model (with or without adapter)."""
    path = folder / BIAS_FILE
    if path.is_file():
        copy_biases(find_biases(model, moe), load_file(path), str(path))


def copy_biases(biases: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy by name; raises WeightsError, and copies nothing, where names or shapes differ."""
    ours, theirs = ({name: tuple(bias.shape) for name, bias in group.items()} for group in (biases, values))
    if ours != theirs:
        differing = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        what, do = "these correction biases are not this model's", "use the base model that the run was made from"
        raise WeightsError(Problem(where, what, do, got=", ".join(differing[:3])))
    with torch.no_grad():
        for name, bias in biases.items():
            bias.copy_(values[name])
