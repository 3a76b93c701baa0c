"""Dropout's masks: random in every respect, and the same wherever the same token is computed."""

import math
from pathlib import Path

import pytest
import torch

from finetune.moe.dropout import InputDropout, LoraDropout, TokenKeys, token_keys_of
from tests.support import save_tiny_mixtral
from tests.unit.engine import IDS, trained_model

TOKENS, FEATURES = 2048, 1024
P = 0.1


def masks(p: float = P, step: int = 1, name: str = "a", tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """`[TOKENS, FEATURES]`, of one module in a micro-batch."""
    token_keys = TokenKeys()
    token_keys.begin(seed, step, torch.arange(tokens))
    return LoraDropout(p, name, token_keys)(torch.ones(tokens, FEATURES))


def standard(mask: torch.Tensor, p: float = P) -> torch.Tensor:
    """Mean 0 and variance 1, if it is random."""
    return (mask.ne(0).float() - (1 - p)) / math.sqrt(p * (1 - p))


def deviations(values: torch.Tensor) -> float:
    """How many standard deviations the mean of independent values is away from 0."""
    return abs(values.sum().item()) / math.sqrt(values.numel())


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_the_asked_share_is_dropped_and_the_rest_is_scaled(p: float) -> None:
    mask = masks(p)
    assert deviations(standard(mask, p)) < 4
    kept = mask[mask != 0]
    assert (kept == kept[0]).all()
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert standard(mask, p).mean(0).abs().max() < 6 / math.sqrt(TOKENS) * max(1, 0.2 / math.sqrt(p * (1 - p)))


def test_features_are_independent_of_each_other_and_tokens_too() -> None:
    for k_nI in (standard(masks()), standard(masks()).T):
        product = k_nI[:, :512].T @ k_nI[:, :512] / math.sqrt(len(k_nI))
        off_diagonal = product[~torch.eye(512, dtype=torch.bool)]
        assert off_diagonal.std().item() == pytest.approx(1, abs=0.02)
        assert off_diagonal.abs().max() < 7


def test_three_and_four_elements_are_independent() -> None:
    """Four of a rectangle would not be if rows and columns were only added up."""
    k_nI = standard(masks(0.5), 0.5)
    for down, right in ((1, 1), (1, 2), (3, 7), (64, 512)):
        two = k_nI * k_nI.roll(down, 0)
        assert deviations(two * two.roll(right, 1)) < 4
        assert deviations(two * k_nI.roll(right, 1)) < 4


@pytest.mark.parametrize("other", [{"step": 2}, {"name": "b"}, {"seed": 1}])
def test_steps_modules_and_seeds_have_masks_of_their_own(other: dict[str, int]) -> None:
    assert deviations(standard(masks()) * standard(masks(**other))) < 4  # type: ignore[arg-type]


def test_experts_have_masks_of_their_own() -> None:
    token_keys = TokenKeys()
    token_keys.begin(0, 1, torch.arange(TOKENS))
    dropout = LoraDropout(P, "experts", token_keys).now(experts=3)
    assert dropout is not None
    like = torch.empty(TOKENS, FEATURES)
    k_EnI = [standard(dropout.mask(like, dropout.keys_T + key)) for key in dropout.expert_keys()]
    assert all(deviations(k_EnI[one] * k_EnI[other]) < 4 for one, other in ((0, 1), (0, 2), (1, 2)))


def test_a_mask_is_the_same_alone_in_another_order_width_and_dtype() -> None:
    token_keys = TokenKeys()
    token_keys.begin(0, 1, torch.arange(300))
    dropout = LoraDropout(P, "a", token_keys).now()
    assert dropout is not None
    whole = dropout.mask(torch.empty(300, 1001), dropout.keys_T)
    order = torch.randperm(300)
    assert torch.equal(dropout.mask(torch.empty(300, 1001), dropout.keys_T[order]), whole[order])
    assert torch.equal(dropout.mask(torch.empty(1, 1001), dropout.keys_T[7:8]), whole[7:8])
    assert torch.equal(dropout.mask(torch.empty(300, 8), dropout.keys_T), whole[:, :8])
    half = dropout.mask(torch.empty(300, 1001, dtype=torch.bfloat16), dropout.keys_T)
    assert torch.equal(half, whole.bfloat16())
    assert dropout.mask(torch.empty(0, 5), dropout.keys_T[:0]).shape == (0, 5)


def test_a_run_that_continues_with_a_later_version_drops_the_same_elements() -> None:
    """Values of an independent computation with Python's integers; they come out on every device."""
    token_keys = TokenKeys()
    token_keys.begin(seed=42, step=7, places=torch.tensor([5 * 2**40 + 3, 2**24, 0]))
    mask = InputDropout(0.5, -123456789, token_keys.present()).mask(torch.empty(3, 16), token_keys.present())
    assert ["".join(map(str, row)) for row in mask.ne(0).int().tolist()] == GOLDEN


GOLDEN = ["1111110101110100", "0001101001111011", "1100011001010011"]


def test_the_gradient_is_that_of_the_values() -> None:
    token_keys = TokenKeys()
    token_keys.begin(0, 1, torch.arange(6))
    module = LoraDropout(0.4, "a", token_keys)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert module(x).shape == x.shape
    assert torch.equal(module.eval()(x), x)


def test_a_forward_without_the_keys_of_its_tokens_is_an_error(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path), targets=["attention", "experts"], lora_dropout=P).train()
    with pytest.raises(RuntimeError, match=r"lora_dropout: a forward in training mode needs TokenKeys\.begin"):
        model(IDS)
    token_keys = token_keys_of(model)
    assert token_keys is not None
    token_keys.begin(0, 1, torch.arange(IDS.numel() - 1))
    message = r"lora_dropout: model\.layers\.0\.self_attn\.q_proj\.default got \[2, 40, 64\] for 79 tokens with a key"
    with pytest.raises(RuntimeError, match=message):
        model(IDS)


def test_every_adapted_part_has_a_name_of_its_own_and_a_router_no_dropout(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path), targets=["attention", "experts", "router"], lora_dropout=P)
    dropouts = [module for module in model.modules() if isinstance(module, LoraDropout)]
    layer = {f"self_attn.{name}_proj" for name in "qkvo"} | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    wanted = {f"model.layers.{number}.{name}.default" for number in (0, 1) for name in layer}
    assert sorted(module.name for module in dropouts) == sorted(wanted)
    assert len({id(module.token_keys) for module in dropouts}) == 1
    assert not any("dropout" in name for name in model.state_dict())
    assert token_keys_of(trained_model(tmp_path)) is None
