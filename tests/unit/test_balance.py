"""The balance term and the z-loss: per layer, over real tokens, the same for every cut of a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from finetune.errors import RunError
from finetune.methods.router_term import STATE_FILE, RouterTerm
from finetune.moe.balance import StepBalance, balance_value, load_figures, token_sums
from finetune.moe.families import FAMILIES
from finetune.moe.router import RouterRecord
from finetune.recipe import RouterSettings
from tests.support import save_tiny_mixtral
from tests.unit.engine import IDS, trained_model

CPU = torch.device("cpu")


def record(logits_LTE: torch.Tensor, top_k: int = 2) -> RouterRecord:
    """What the routers would have recorded for these logits."""
    return RouterRecord(list(logits_LTE), [logits.topk(top_k, -1).indices for logits in logits_LTE])


def two_layers(**choices: Any) -> StepBalance:
    return StepBalance([2, 2], 4, CPU, **choices)


def begin(balance: StepBalance, tokens: int) -> StepBalance:
    balance.begin_step(torch.tensor(tokens))
    return balance


def share(balance: StepBalance, logits_LTE: torch.Tensor, real_T: torch.Tensor | None = None) -> torch.Tensor:
    """The micro-batch's share of the balance term and of the z-loss, `[2]`."""
    real_T = torch.ones(logits_LTE.shape[1]) if real_T is None else real_T
    return torch.stack(balance.terms(token_sums(record(logits_LTE), real_T), real_T.sum()))


def test_a_balanced_router_scores_top_k_and_a_collapsed_one_the_number_of_experts() -> None:
    uniform = torch.full((2, 4), 0.5)
    assert balance_value(uniform, torch.full((2, 4), 0.25)).item() == pytest.approx(2.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert balance_value(collapsed, collapsed).item() == pytest.approx(4.0)


def test_two_layers_collapsed_onto_different_experts_are_seen_per_layer_and_pass_for_balanced_when_pooled() -> None:
    frequency = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    assert balance_value(frequency, frequency / 2).item() == pytest.approx(4.0)
    assert balance_value(frequency, frequency / 2, pooled=True).item() == pytest.approx(2.0)


@pytest.mark.parametrize("scope", ["step", "micro_batch"])
def test_padding_counts_for_nothing_in_the_balance_term(scope: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 10, 4)
    padded = torch.cat([logits, 5 * torch.randn(2, 6, 4)], dim=1)
    values = []
    for each, real in ((logits, torch.ones(10)), (padded, torch.cat([torch.ones(10), torch.zeros(6)]))):
        balance = begin(two_layers(scope=scope), 10)
        balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
        terms = share(balance, each, real)
        values.append((*terms.tolist(), *balance.end_step(lambda x: x).count_LE.flatten().tolist()))
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("balance", ["per_layer", "pooled"])
@pytest.mark.parametrize("cuts", [[16], [8, 8], [1] * 16, [3, 5, 8]], ids=str)
def test_the_balance_shares_of_a_step_sum_up_to_the_same_terms_over_several_steps(
    cuts: list[int], balance: str
) -> None:
    torch.manual_seed(0)
    whole, cut = two_layers(balance=balance), two_layers(balance=balance)
    for logits in torch.randn(3, 2, 16, 4):
        wanted = share(begin(whole, 16), logits)
        begin(cut, 16)
        parts = torch.stack([share(cut, part) for part in logits.split(cuts, dim=1)])
        torch.testing.assert_close(parts.sum(0), wanted, atol=1e-6, rtol=1e-6)
        exact, of_cut = whole.end_step(lambda x: x), cut.end_step(lambda x: x)
        assert of_cut.value.item() == pytest.approx(exact.value.item(), abs=1e-6)
        assert of_cut.z.item() == pytest.approx(exact.z.item(), abs=1e-6)


def test_accumulation_over_equal_micro_batches_does_not_change_the_strength_of_their_balance_term() -> None:
    """In scope micro_batch: value and gradient of eight equal micro-batches are those of one alone."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 4)
    values, gradients = [], []
    for times in (1, 8):
        leaf = logits.clone().requires_grad_()
        balance = begin(two_layers(scope="micro_batch"), 6 * times)
        total = torch.stack([share(balance, leaf)[0] for _ in range(times)]).sum()
        values.append(total.item())
        gradients.append(torch.autograd.grad(total, leaf)[0])
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


def test_micro_batches_weigh_by_their_real_tokens_in_the_balance_term() -> None:
    torch.manual_seed(0)
    parts = torch.randn(2, 3, 4), torch.randn(2, 9, 4)
    alone = [share(begin(two_layers(scope="micro_batch"), part.shape[1]), part)[0].item() for part in parts]
    balance = begin(two_layers(scope="micro_batch"), 12)
    together = sum(share(balance, part)[0].item() for part in parts)
    assert together == pytest.approx((3 * alone[0] + 9 * alone[1]) / 12, abs=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_a_pooled_micro_batch_has_the_balance_loss_of_transformers_value_and_gradient(masked: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5]) if masked else torch.ones(2, 12, dtype=torch.long)
    logits = torch.randn(3, 24, 4, requires_grad=True)
    theirs = load_balancing_loss_func(tuple(logits), 4, 2, mask if masked else None)
    balance = begin(StepBalance([2] * 3, 4, CPU, "pooled", "micro_batch"), int(mask.sum()))
    ours = share(balance, logits, mask.reshape(-1))[0]
    assert isinstance(theirs, torch.Tensor)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    assert balance.end_step(lambda x: x).value.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_the_first_step_has_uniform_frequencies_and_the_next_those_of_the_step_before() -> None:
    balance = begin(StepBalance([2], 4, CPU), 5)
    assert balance.frequency_LE.tolist() == [[0.5] * 4]
    logits = torch.tensor([[[4.0, 3.0, 0.0, 0.0]] * 5])
    share(balance, logits)
    step = balance.end_step(lambda x: x)
    assert balance.frequency_LE.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert step.count_LE.tolist() == [[5.0, 5.0, 0.0, 0.0]]
    assert step.value.item() == pytest.approx(4 * logits[0, 0].softmax(-1)[:2].sum().item())
    figures = {name: values.tolist() for name, values in load_figures(step.count_LE).items()}
    assert figures == {"max_load": [2.0], "entropy": [pytest.approx(0.5)], "dead_experts": [2.0]}


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_router_scores_that_sum_to_one_and_the_z_loss_have_exact_gradients(scores: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    index = logits.topk(2, -1).indices
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])

    def sums(leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        done = token_sums(RouterRecord([leaf], [index]), weight, scores)
        return done.probability_LE, done.z_L

    probability, z = sums(logits)
    chosen = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True) if scores == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(probability[0], (chosen * weight.unsqueeze(-1)).sum(0))
    torch.testing.assert_close(z[0], (logits.exp().sum(-1).log().square() * weight).sum())
    assert torch.autograd.gradcheck(sums, logits, fast_mode=True)


def test_sigmoid_scores_that_underflow_still_sum_to_one() -> None:
    sums = token_sums(
        RouterRecord([torch.full((3, 4), -200.0)], [torch.zeros(3, 2, dtype=torch.long)]), torch.ones(3), "sigmoid"
    )
    assert sums.probability_LE.tolist() == [[0.75] * 4]


def test_the_backward_keeps_the_logits_and_no_float32_copy_of_them() -> None:
    """The router's logits live anyway; their softmax in float32 would cost twice as much for every layer."""
    logits = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        token_sums(RouterRecord([logits], [logits.topk(2, -1).indices]), torch.ones(64))
    assert [each.shape for each in kept if each.dtype == torch.float32 and each.dim() > 1] == []


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


def term_of(model: object, coefficient: float = 0.5, **settings: Any) -> RouterTerm:
    return RouterTerm(model, FAMILIES["mixtral"], RouterSettings(router_aux_loss_coef=coefficient, **settings))


def test_the_captured_logits_are_those_that_transformers_returns(base: Path) -> None:
    model = trained_model(base).eval()
    term = term_of(model)
    with torch.no_grad(), term.capture() as captured:
        wanted = model(IDS, output_router_logits=True).router_logits
    assert len(captured.logits) == 2
    for ours, theirs in zip(captured.logits, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_whole_loss_with_a_pooled_balance_term_is_that_of_transformers(base: Path) -> None:
    model = trained_model(base).train()
    model.config.router_aux_loss_coef = model.get_base_model().router_aux_loss_coef = 0.3
    mask = torch.tensor([[1] * 40, [1] * 25 + [0] * 15])
    term = term_of(model, 0.3, balance="pooled", scope="micro_batch")
    term.begin_step(mask.sum(), logged=False)
    with term.capture() as captured:
        theirs = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True)
    ce = theirs.loss - 0.3 * theirs.aux_loss
    torch.testing.assert_close(term.add(ce, captured, mask.reshape(-1), ranks=1), theirs.loss, atol=1e-5, rtol=1e-5)


def test_coefficients_of_zero_leave_the_loss_bit_for_bit(base: Path) -> None:
    model = trained_model(base)
    term = term_of(model, coefficient=0.0)
    term.begin_step(torch.tensor(IDS.numel()), logged=True)
    with term.capture() as captured:
        loss = model(IDS, labels=IDS).loss
    assert torch.equal(term.add(loss, captured, torch.ones(IDS.numel()), ranks=1), loss)
    term.end_step(lambda x: x)
    assert term.figures()[0]["balance_loss"] > 0


def test_the_balance_state_survives_a_checkpoint_and_a_missing_one_is_an_error(base: Path, tmp_path: Path) -> None:
    saved, loaded = term_of(trained_model(base)), term_of(trained_model(base))
    saved.balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
    (tmp_path / STATE_FILE).write_text(json.dumps(saved.state_dict()))
    loaded.load(tmp_path)
    assert torch.equal(loaded.balance.frequency_LE, saved.balance.frequency_LE)
    with pytest.raises(RunError, match=r"router_balance.json: the checkpoint has no router state; start anew"):
        loaded.load(tmp_path / "elsewhere")
