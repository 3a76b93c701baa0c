"""Properties of the balance term and the z-loss on any logits: linear in tokens, bounded, top_k when uniform."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.moe.balance import StepBalance, TokenSums, balance_value, load_figures, token_sums
from finetune.moe.router import RouterRecord

CPU = torch.device("cpu")


@st.composite
def routed(draw: st.DrawFn) -> tuple[RouterRecord, torch.Tensor, int]:
    """Logits `[L, T, E]` of any scale, the experts that they choose, which tokens are real, and K."""
    layers, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(layers, tokens, experts, generator=generator) * draw(st.sampled_from([0.0, 0.1, 3.0, 100.0]))
    real = torch.rand(tokens, generator=generator).round()
    return RouterRecord(list(logits), [each.topk(top_k, -1).indices for each in logits]), real, top_k


scores = st.sampled_from(["softmax", "sigmoid"])


def part(record: RouterRecord, chosen: slice) -> RouterRecord:
    return RouterRecord([each[chosen] for each in record.logits], [each[chosen] for each in record.indices])


@given(routed(), scores, st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_balance_sums_are_linear_in_tokens(case: tuple[RouterRecord, torch.Tensor, int], kind: str, at: int) -> None:
    """Any cut of the tokens into two parts gives the same sums: counts exactly, scores and z up to rounding."""
    record, real, _ = case
    whole = token_sums(record, real, kind)  # type: ignore[arg-type]
    parts = [token_sums(part(record, cut), real[cut], kind) for cut in (slice(0, at), slice(at, None))]  # type: ignore[arg-type]
    assert torch.equal(parts[0].count_LE + parts[1].count_LE, whole.count_LE)
    torch.testing.assert_close(
        parts[0].probability_LE + parts[1].probability_LE, whole.probability_LE, atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(parts[0].z_L + parts[1].z_L, whole.z_L, atol=1e-4, rtol=1e-5)


@given(routed(), scores)
@settings(deadline=None, max_examples=60)
def test_every_real_token_gives_one_unit_of_score_and_top_k_choices(
    case: tuple[RouterRecord, torch.Tensor, int], kind: str
) -> None:
    record, real, top_k = case
    sums = token_sums(record, real, kind)  # type: ignore[arg-type]
    tokens = real.sum().item()
    torch.testing.assert_close(
        sums.probability_LE.sum(-1), torch.full((len(record.logits),), tokens), atol=1e-4, rtol=1e-5
    )
    assert sums.count_LE.sum(-1).tolist() == [tokens * top_k] * len(record.logits)


@given(routed(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_balance_value_lies_between_nothing_and_the_number_of_experts(
    case: tuple[RouterRecord, torch.Tensor, int], pooled: bool
) -> None:
    record, _, _ = case
    tokens, experts = record.logits[0].shape
    sums = token_sums(record, torch.ones(tokens))
    value = balance_value(sums.count_LE / tokens, sums.probability_LE / tokens, pooled).item()
    assert 0 <= value <= experts * (1 + 1e-5)
    figures = load_figures(sums.count_LE)
    assert all(1 - 1e-5 <= load <= experts * (1 + 1e-5) for load in figures["max_load"].tolist())
    assert all(-1e-5 <= entropy <= 1 + 1e-5 for entropy in figures["entropy"].tolist())


@given(routed(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_uniform_frequencies_or_uniform_scores_give_top_k(
    case: tuple[RouterRecord, torch.Tensor, int], pooled: bool
) -> None:
    """So the term of the first step is a constant, and a balanced load scores top_k whatever the scores are."""
    record, _, top_k = case
    tokens, experts = record.logits[0].shape
    sums: TokenSums = token_sums(record, torch.ones(tokens))
    balance = StepBalance([top_k] * len(record.logits), experts, CPU, "pooled" if pooled else "per_layer")
    balance.begin_step(torch.tensor(tokens))
    assert abs(balance.terms(sums, torch.tensor(tokens))[0].item() - top_k) < 1e-4 * experts
    uniform = torch.full_like(sums.probability_LE, 1 / experts)
    assert abs(balance_value(sums.count_LE / tokens, uniform, pooled).item() - top_k) < 1e-4 * experts
