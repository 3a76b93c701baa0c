"""The balance term: per layer, over real tokens, the same for every cut of a step."""

from pathlib import Path

import pytest
import torch

from finetune.errors import RunError
from finetune.methods.router_term import RouterTerm
from finetune.moe.families import FAMILIES
from finetune.moe.router import RouterRecord, StepBalance, balance_value, load_summary
from tests.support import save_tiny_mixtral
from tests.unit.engine import IDS, trained_model

CPU = torch.device("cpu")


def record(logits_LTE: torch.Tensor, top_k: int = 2) -> RouterRecord:
    """What the routers would have recorded for these logits."""
    return RouterRecord(list(logits_LTE), [logits.topk(top_k, -1).indices for logits in logits_LTE])


def test_a_balanced_router_scores_top_k_and_a_collapsed_one_the_number_of_experts() -> None:
    uniform = torch.full((2, 4), 0.5)
    assert balance_value(uniform, torch.full((2, 4), 0.25)).item() == pytest.approx(2.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert balance_value(collapsed, collapsed).item() == pytest.approx(4.0)


def test_two_layers_collapsed_onto_different_experts_score_worse_than_uniform() -> None:
    """Pooled over layers, as transformers counts, this would score the optimum."""
    frequency = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    probability = frequency / 2
    pooled = balance_value(frequency.mean(0, keepdim=True), probability.mean(0, keepdim=True))
    assert pooled.item() == pytest.approx(2.0)
    assert balance_value(frequency, probability).item() == pytest.approx(4.0)


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 10, 4)
    padded = torch.cat([logits, 5 * torch.randn(2, 6, 4)], dim=1)
    values = []
    for each, real in ((logits, torch.ones(10)), (padded, torch.cat([torch.ones(10), torch.zeros(6)]))):
        balance = StepBalance(2, 4, 2, CPU)
        balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
        balance.begin_step(10)
        term = balance.term(record(each), real)
        values.append((term.item(), *balance.end_step(lambda x: x)[1].flatten().tolist()))
    assert values[0] == pytest.approx(values[1], abs=1e-6)


@pytest.mark.parametrize("cuts", [[16], [8, 8], [1] * 16, [3, 5, 8]], ids=str)
def test_the_shares_of_a_step_sum_up_to_the_same_term_over_several_steps(cuts: list[int]) -> None:
    torch.manual_seed(0)
    steps = torch.randn(3, 2, 16, 4)
    whole, cut = StepBalance(2, 4, 2, CPU), StepBalance(2, 4, 2, CPU)
    for logits in steps:
        whole.begin_step(16)
        cut.begin_step(16)
        wanted = whole.term(record(logits), torch.ones(16))
        parts = [cut.term(record(part), torch.ones(part.shape[1])) for part in logits.split(cuts, dim=1)]
        assert sum(parts).item() == pytest.approx(wanted.item(), abs=1e-6)  # type: ignore[union-attr]
        exact, _ = whole.end_step(lambda x: x)
        assert cut.end_step(lambda x: x)[0] == pytest.approx(exact, abs=1e-6)


def test_the_first_step_has_uniform_frequencies_and_the_next_those_of_the_step_before() -> None:
    balance = StepBalance(1, 4, 2, CPU)
    assert balance.frequency_LE.tolist() == [[0.5] * 4]
    logits = torch.tensor([[[4.0, 3.0, 0.0, 0.0]] * 5])
    balance.begin_step(5)
    balance.term(record(logits), torch.ones(5))
    value, share = balance.end_step(lambda x: x)
    assert balance.frequency_LE.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert share.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert value == pytest.approx(4 * logits[0, 0].softmax(-1)[:2].sum().item())
    assert load_summary(share)["router/dead_experts"] == 2
    assert load_summary(share)["router/max_load"] == pytest.approx(2.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


def term_of(model: object, coefficient: float = 0.5) -> RouterTerm:
    moe = FAMILIES["mixtral"].moe
    assert moe is not None
    return RouterTerm(model, moe, coefficient)


def test_the_captured_logits_are_those_that_transformers_returns(base: Path) -> None:
    model = trained_model(base).eval()
    term = term_of(model)
    with torch.no_grad(), term.capture() as captured:
        wanted = model(IDS, output_router_logits=True).router_logits
    assert len(captured.logits) == 2
    for ours, theirs in zip(captured.logits, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_coefficient_of_zero_leaves_the_loss_bit_for_bit(base: Path) -> None:
    model = trained_model(base)
    term = term_of(model, coefficient=0.0)
    term.balance.begin_step(IDS.numel())
    with term.capture() as captured:
        loss = model(IDS, labels=IDS).loss
    assert torch.equal(term.add(loss, captured, torch.ones(IDS.numel()), ranks=1), loss)
    assert term.end_step(lambda x: x) > 0


def test_the_state_survives_a_checkpoint_and_a_missing_one_is_an_error(base: Path, tmp_path: Path) -> None:
    saved, loaded = term_of(trained_model(base)), term_of(trained_model(base))
    saved.balance.frequency_LE = torch.tensor([[0.9, 0.6, 0.3, 0.2], [0.1, 0.4, 0.8, 0.7]])
    saved.save(tmp_path)
    loaded.load(tmp_path)
    assert torch.equal(loaded.balance.frequency_LE, saved.balance.frequency_LE)
    with pytest.raises(RunError, match=r"router_balance.json: the checkpoint has no router state; start anew"):
        loaded.load(tmp_path / "elsewhere")
