"""Every loss of a recipe against TRL's own `DPOTrainer._compute_loss`: values and gradients."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from finetune.methods.dpo_losses import LOSSES, PairLogps, answer_logps, dpo_losses, loss_weights, pair_weights
from finetune.recipe import DpoSettings
from finetune.recipe.method_settings import Divergence, PairLoss
from tests.support import save_tiny_mixtral, tiny_tokenizer

TOLERANCE = 2e-6
PAIRS, LONGEST = 7, 9
ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.2, "aot_unpaired": 0.2}


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer as it is, whose model is never run: its loss gets the output of a model instead."""
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    folder = tmp_path_factory.mktemp("trl")
    config = DPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], precompute_ref_log_probs=False)
    model = str(save_tiny_mixtral(folder / "model"))
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.accelerator = SimpleNamespace(  # the session's device may be a GPU; these losses are compared on the CPU
        device=torch.device("cpu"), gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
    )
    trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, False
    return trainer


def batch(scale: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random log-probabilities of tokens and of reference answers; the answers differ in length, some tokens of them
    are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (2 * PAIRS,), generator=generator)
    mask = (torch.arange(LONGEST) < lengths.unsqueeze(1)).long()
    mask[:, 1] = 0
    log_probs = -torch.rand(2 * PAIRS, LONGEST, generator=generator) * mask
    reference = log_probs.sum(1) + scale * torch.randn(2 * PAIRS, generator=generator)
    squares = -torch.rand(2 * PAIRS, LONGEST, generator=generator) * mask
    return {"log_probs": log_probs, "mask": mask, "reference": reference, "squares": squares}


def of_trl(trainer: Any, settings: DpoSettings, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities of the tokens."""
    for name in ("beta", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef"):
        setattr(trainer, name, getattr(settings, name))
    trainer.use_weighting, trainer.args.discopop_tau = settings.use_weighting, settings.discopop_tau
    trainer.loss_types = settings.loss_type
    trainer.loss_weights = settings.loss_weights or [1.0] * len(settings.loss_type)
    leaf = given["log_probs"].clone().requires_grad_()
    log_probs = leaf * given["mask"]
    mask = torch.nn.functional.pad(given["mask"], (1, 0))  # a place before the answers, which TRL shifts off
    chosen, rejected = given["reference"].chunk(2)
    zeros = torch.zeros_like(given["log_probs"])
    output = FusedCausalLMOutput(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=given["squares"]
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = trainer._compute_loss(lambda **_: output, inputs, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def of_ours(settings: DpoSettings, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean over pairs, plus the SFT loss as a mean over tokens."""
    leaf, mask = given["log_probs"].clone().requires_grad_(), given["mask"]
    log_probs = leaf * mask
    policy = answer_logps(log_probs, mask, settings.ld_alpha).chunk(2)
    losses = dpo_losses(PairLogps(*policy, *given["reference"].chunk(2), *mask.sum(1).chunk(2)), settings)
    if settings.use_weighting:
        losses = losses * pair_weights(log_probs, given["squares"], mask)
    loss = losses.mean()
    if sft := loss_weights(settings).get("sft"):
        loss = loss - sft * log_probs[:PAIRS].sum() / mask[:PAIRS].sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def assert_like_trl(trainer: Any, given: dict[str, torch.Tensor], **method: Any) -> None:
    settings = DpoSettings(kind="dpo", **{"beta": 0.5, **method})
    wanted_loss, wanted_gradient = of_trl(trainer, settings, given)
    assert wanted_loss.isfinite()
    assert wanted_gradient.isfinite().all()
    assert wanted_gradient.abs().max() > 1e-4
    loss, gradient = of_ours(settings, given)
    torch.testing.assert_close(loss, wanted_loss, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(gradient, wanted_gradient, atol=TOLERANCE, rtol=TOLERANCE)


def test_there_is_a_function_for_every_loss_of_a_recipe() -> None:
    assert {*LOSSES, "sft"} == set(get_args(PairLoss))


@pytest.mark.parametrize("name", get_args(PairLoss))
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_each_loss_is_trls(trl_trainer: Any, name: str, ld_alpha: float | None) -> None:
    smoothing = SMOOTHING.get(name, 0.0)
    assert_like_trl(trl_trainer, batch(), loss_type=[name], label_smoothing=smoothing, ld_alpha=ld_alpha)


@pytest.mark.parametrize("name", sorted({*get_args(PairLoss)} - {"aot", "aot_unpaired", "hinge", "sft"}))
def test_each_loss_with_weighted_pairs_is_trls(trl_trainer: Any, name: str) -> None:
    smoothing = SMOOTHING.get(name, 0.0)
    assert_like_trl(trl_trainer, batch(), loss_type=[name], label_smoothing=smoothing, use_weighting=True)


def test_hinge_with_weighted_pairs_has_a_gradient_where_trl_raises(trl_trainer: Any) -> None:
    """TRL multiplies the output of relu in place. The weights have no gradient, so pair by pair it is TRL's own."""
    plain = DpoSettings(kind="dpo", beta=0.5, loss_type=["hinge"])
    weighted = plain.model_copy(update={"use_weighting": True})
    given = batch()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_trl(trl_trainer, weighted, given)
    weights = pair_weights(given["log_probs"], given["squares"], given["mask"])
    wanted = of_trl(trl_trainer, plain, given)[1] * weights.repeat(2).unsqueeze(1)
    torch.testing.assert_close(of_ours(weighted, given)[1], wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("name", ANY_DIVERGENCE)
def test_each_divergence_is_trls(trl_trainer: Any, name: str, divergence: str, alpha: float) -> None:
    method = {
        "f_divergence_type": divergence,
        "f_alpha_divergence_coef": alpha,
        "label_smoothing": SMOOTHING.get(name, 0),
    }
    assert_like_trl(trl_trainer, batch(), loss_type=[name], **method)


def test_several_losses_are_added_by_their_weights(trl_trainer: Any) -> None:
    losses = ["sigmoid", "bco_pair", "sft", "aot"]
    assert_like_trl(trl_trainer, batch(), loss_type=losses, loss_weights=[0.8, 0.2, 1.5, 0.7], label_smoothing=0.1)


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_the_temperature_of_discopop_is_trls(trl_trainer: Any, tau: float) -> None:
    assert_like_trl(trl_trainer, batch(), loss_type=["discopop"], discopop_tau=tau)


def test_rewards_far_from_0_are_trls(trl_trainer: Any) -> None:
    for name in ("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "sigmoid_norm"):
        assert_like_trl(trl_trainer, batch(scale=40.0), loss_type=[name])
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 3.0}
    assert_like_trl(trl_trainer, batch(scale=10.0), loss_type=["sigmoid_norm"], beta=1e-3, **alpha)


def test_ipo_with_forward_kl_is_nan_here_where_it_is_nan_in_trl(trl_trainer: Any) -> None:
    """exp(-log ratio) overflows where the reference finds both answers e^88 times as likely: no value to compare."""
    given = batch()
    given["reference"] = given["reference"] + 200.0
    settings = DpoSettings(kind="dpo", beta=0.5, loss_type=["ipo"], f_divergence_type="forward_kl")
    assert of_trl(trl_trainer, settings, given)[0].isnan()
    assert of_ours(settings, given)[0].isnan()
