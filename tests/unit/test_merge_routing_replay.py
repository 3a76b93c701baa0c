"""Choices of experts are kept and made again, whatever function a router chooses with; others are counted."""

import pytest
import torch

from finetune.merge.routing_replay import Routing
from finetune.moe.families import FAMILIES
from tests.families import tiny_model


def chosen_experts(block: torch.nn.Module, name: str) -> list[torch.Tensor]:
    """The list that the block's choices will be appended to, as its experts are given them."""
    seen: list[torch.Tensor] = []
    block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[1].sort(-1).values))
    return seen


@pytest.mark.parametrize(
    "model_type", ["mixtral", "phimoe", "deepseek_v3", "deepseek_v2", "granitemoe", "hunyuan_v1_moe"]
)
def test_another_model_makes_the_kept_choices_with_its_own_weights(model_type: str) -> None:
    moe = FAMILIES[model_type].moe
    assert moe is not None
    layers = [tiny_model(model_type, seed=seed).model.layers[-1] for seed in (0, 1)]
    path, _, name = moe.experts_module.rpartition(".")
    ours, theirs = (layer.get_submodule(path) for layer in layers)
    seen, seen_there = chosen_experts(ours, name), chosen_experts(theirs, name)
    x, real = torch.randn(2, 40, 64), torch.ones(2, 40, dtype=torch.bool)
    real[1, 15:] = False
    routing = Routing(moe.experts_module)
    with torch.no_grad():
        theirs(x)  # its own choice
        with routing.record(1, layers[0]):
            ours(x)
        with routing.replay(1, layers[1], real):
            replayed = theirs(x)
        with routing.replay(1, layers[0], real):
            ours(x)
    own, there = seen_there
    assert not torch.equal(own, seen[0])
    assert torch.equal(there, seen[0])
    assert torch.equal(seen[1], seen[0])
    assert replayed is not None
    assert 0 < routing.differing < routing.decisions / 2  # half of the decisions are of the model with itself
    if model_type == "mixtral":
        same = (own[:, :, None] == seen[0][:, None, :]).any(-1)[real.flatten()].sum()
        assert (routing.differing, routing.decisions) == (110 - int(same), 220)


def test_a_layer_without_experts_is_left_alone() -> None:
    layer = tiny_model("deepseek_v3").model.layers[0]
    routing = Routing("mlp.experts")
    with torch.no_grad(), routing.record(0, layer):
        layer.mlp(torch.randn(1, 4, 64))
    assert routing.kept == {0: []}
