"""Experts of any shape against a plain loop in double precision: values, gradients, dropout, every layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from finetune.moe import experts as engine
from finetune.moe.dropout import InputDropout, LoraDropout, TokenKeys
from finetune.moe.engine.routed_rows import ChunkSize, ExpertFactors
from finetune.moe.experts import experts_forward
from finetune.moe.nf4 import Nf4Stack

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Case:
    """One module, its tokens and their routing."""

    hidden: int = 6
    intermediate: int = 5
    num_experts: int = 3
    top_k: int = 2
    tokens: int = 7
    rank: int = 2
    use_rslora: bool = False
    dtype: torch.dtype = torch.float32
    quantised: bool = False
    transposed: bool = False
    bias: bool = False
    gate: str = "halves"  # halves, interleaved, none
    dropout: float = 0.0
    chosen: tuple[int, ...] | None = None
    routing: str = "random"  # random, one expert has all, some have none
    seed: int = 0

    @property
    def scaling(self) -> float:
        """As PEFT computes it, with lora_alpha = 4."""
        return 4 / (math.sqrt(self.rank) if self.use_rslora else self.rank)


GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves": lambda u: silu(u.chunk(2, -1)[0]) * u.chunk(2, -1)[1],
    "interleaved": lambda u: u[..., ::2] * torch.sigmoid(1.7 * u[..., ::2]) * (u[..., 1::2] + 1),
    "none": silu,
}


class Module(SimpleNamespace):
    """An experts module with the attributes that transformers' decorator gives it."""

    def parameter(self, case: Case, name: str, out: int, inp: int, random: torch.Generator) -> None:
        """One stack with bias and factors; `leaves` holds the factors."""
        E = case.num_experts
        shape = (E, inp, out) if case.transposed else (E, out, inp)
        weight = (torch.randn(shape, generator=random) * 0.3).to(case.dtype)
        setattr(self, name, torch.nn.Parameter(Nf4Stack.quantize(weight) if case.quantised else weight, False))
        setattr(self, f"{name}_bias", (torch.randn(E, out, generator=random) * 0.3).to(case.dtype))
        S = E if case.chosen is None else len(case.chosen)
        A = (torch.randn(S, case.rank, inp, generator=random) * 0.3).to(case.dtype).requires_grad_()
        B = (torch.randn(S, case.rank, out, generator=random) * 0.3).to(case.dtype).requires_grad_()
        factors = ExpertFactors(A, B, case.scaling, dropout_of(case, name), case.chosen)
        self.lora_sources[name] = SimpleNamespace(active_factors=lambda: [factors], leaves=(A, B))


def dropout_of(case: Case, name: str) -> InputDropout | None:
    """As the training of one micro-batch has it."""
    if not case.dropout:
        return None
    token_keys = TokenKeys()
    token_keys.begin(case.seed, step=1, places=torch.arange(case.tokens))
    return LoraDropout(case.dropout, name, token_keys).now(case.num_experts)


def build(case: Case) -> Any:
    """The module of a case."""
    random = torch.Generator().manual_seed(case.seed)
    module = Module(num_experts=case.num_experts, lora_sources={}, is_transposed=case.transposed, has_bias=case.bias)
    module.has_gate, module._is_expert_parallel = case.gate != "none", False
    module._apply_gate = module.act_fn = GATES[case.gate]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    wide = case.intermediate * (2 if module.has_gate else 1)
    module.parameter(case, first, wide, case.hidden, random)
    module.parameter(case, "down_proj", case.hidden, case.intermediate, random)
    return module


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, choices and router weights."""
    random = torch.Generator().manual_seed(case.seed + 1)
    x_TH = torch.randn(case.tokens, case.hidden, generator=random).to(case.dtype).requires_grad_()
    allowed = case.num_experts if case.routing == "random" else case.top_k
    index_TK = torch.stack([torch.randperm(allowed, generator=random)[: case.top_k] for _ in range(case.tokens)])
    if case.routing == "some tokens have none":
        index_TK[::2] = case.num_experts
    return x_TH, index_TK, torch.rand(case.tokens, case.top_k, generator=random).requires_grad_()


def reference(module: Any, case: Case, x_TH: torch.Tensor, index_TK: torch.Tensor, w_TK: torch.Tensor) -> torch.Tensor:
    """One loop over tokens and choices with `W x + s B A dropout(x)`, in double precision."""

    def linear(name: str, expert: int, token: int, row: torch.Tensor) -> torch.Tensor:
        data = getattr(module, name).data
        weight = (data.expert(expert) if isinstance(data, Nf4Stack) else data[expert]).double()
        weight = weight.T if case.transposed else weight
        out = weight @ row
        experts = list(range(case.num_experts) if case.chosen is None else case.chosen)
        if expert in experts:
            A, B = (factor[experts.index(expert)].double() for factor in module.lora_sources[name].leaves)
            dropout = dropout_of(case, name)
            if dropout is not None:
                row = row * dropout.mask(row.detach()[None], dropout.keys_T[token] + dropout.expert_keys()[expert])[0]
            out = out + case.scaling * B.T @ (A @ row)
        return out + getattr(module, f"{name}_bias")[expert].double() if case.bias else out

    first = "gate_up_proj" if module.has_gate else "up_proj"
    total = []
    for token in range(case.tokens):
        row = torch.zeros(case.hidden, dtype=torch.float64)
        for expert, weight in zip(index_TK[token].tolist(), w_TK[token], strict=True):
            if expert < case.num_experts:
                hidden = GATES[case.gate](linear(first, expert, token, x_TH[token].double()))
                row = row + weight.double() * linear("down_proj", expert, token, hidden)
        total.append(row)
    return torch.stack(total)


def leaves_of(module: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [*tensors, *(leaf for source in module.lora_sources.values() for leaf in source.leaves)]


def check(case: Case) -> None:
    """Values and all gradients are the reference's, to the precision of the case's dtype."""
    module, (x_TH, index_TK, w_TK) = build(case), inputs(case)
    random_TH = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(9))
    leaves = leaves_of(module, x_TH, w_TK)
    ours, wanted = experts_forward(module, x_TH, index_TK, w_TK), reference(module, case, x_TH, index_TK, w_TK)
    got = torch.autograd.grad((ours.double() * random_TH).sum(), leaves)
    expected = torch.autograd.grad(
        (wanted * random_TH).sum() + 0 * sum(leaf.sum() for leaf in leaves), leaves
    )  # the zero term: a leaf that no token reaches
    precision = 1e-5 if case.dtype == torch.float32 else 16 * torch.finfo(case.dtype).eps / 2
    for name, a, b in zip(["output", "x", "w", "A", "B", "A", "B"], [ours, *got], [wanted, *expected], strict=True):
        a, b = a.detach().double(), b.detach().double()
        error = (a - b).abs().max()
        assert error <= precision * max(1.0, float(b.abs().max())), f"{name}: {error:.2e} for {case}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_experts = draw(st.integers(1, 6))
    sizes = st.integers(1, 9)
    quantised = draw(st.booleans())
    hidden = draw(sizes)
    return Case(
        hidden=2 * hidden if quantised else hidden,  # two 4-bit values make a byte
        intermediate=draw(sizes),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        tokens=draw(st.integers(1, 12)),
        rank=draw(st.sampled_from([1, 2, 3, 8, 33, 64])),
        use_rslora=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        quantised=quantised,
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        gate=draw(st.sampled_from(sorted(GATES))),
        chosen=draw(st.none() | st.sets(st.integers(0, num_experts - 1), min_size=1).map(lambda s: tuple(sorted(s)))),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        routing=draw(st.sampled_from(["random", "few experts have all", "some tokens have none"])),
        seed=draw(st.integers(0, 99)),
    )


@given(cases())
@QUICK
def test_experts_of_any_shape_are_those_of_the_plain_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("rows", [1, 3, 10_000])
def test_experts_are_the_same_however_their_rows_are_cut(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChunkSize, "for_columns", lambda *_: ChunkSize(shared=rows, single=rows))
    check(Case(num_experts=6, tokens=20, chosen=(1, 4), dropout=0.3))
    check(Case(num_experts=6, tokens=20, bias=True, routing="few experts have all"))
    check(Case(num_experts=6, tokens=20, hidden=8, quantised=True, routing="few experts have all", dropout=0.3))


@given(cases())
@settings(QUICK, max_examples=8)
def test_gradients_of_experts_are_the_derivatives_of_their_values(case: Case) -> None:
    """With dropout too: its mask is made again in the backward, and must be that of the forward."""
    for dropout in (0.0, 0.4):
        exact = Case(**{**vars(case), "dtype": torch.float64, "tokens": min(case.tokens, 4), "rank": min(case.rank, 3)})
        exact = Case(**{**vars(exact), "dropout": dropout, "quantised": False})
        module, (x_TH, index_TK, w_TK) = build(exact), inputs(exact)

        def run(*leaves: torch.Tensor, index_TK: torch.Tensor = index_TK, module: Any = module) -> torch.Tensor:
            return experts_forward(module, leaves[0], index_TK, leaves[1])

        leaves = leaves_of(module, x_TH, w_TK.detach().double().requires_grad_())
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_dropout_of_experts_drops_the_asked_share_and_scales_the_rest() -> None:
    """On a token of ones, a first factor of ones and no weight, a row is the mean of what was kept."""
    case = Case(hidden=4000, intermediate=1, tokens=4, num_experts=1, top_k=1, rank=1, gate="none", dropout=0.25)
    module, (_, index_TK, _) = build(case), inputs(case)
    for name in ("up_proj", "down_proj"):
        getattr(module, name).data.zero_()
    (up_A, up_B), (down_A, down_B) = (source.leaves for source in module.lora_sources.values())
    with torch.no_grad():
        up_A.fill_(1 / case.hidden)
        up_B.fill_(10.0)
        down_A.fill_(1.0)
        down_B.fill_(1.0)
    module.act_fn = lambda u_nO: u_nO / (10 * case.scaling)
    module.lora_sources["down_proj"].active_factors = lambda: [ExpertFactors(down_A, down_B, 1.0)]
    rows = experts_forward(module, torch.ones(4, 4000), index_TK, torch.ones(4, 1))[:, 0]
    assert len(set(rows.tolist())) == 4
    torch.testing.assert_close(rows, torch.ones(4), atol=0.05, rtol=0)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True, "gate": "interleaved", "transposed": True}, {"chosen": (1, 3)}, {"dropout": 0.3}, {"rank": 3}],
    ids=["plain", "gpt_oss", "chosen", "dropout", "odd rank"],
)
def test_grouped_products_give_what_the_loop_over_experts_gives(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], quantised: bool
) -> None:
    """What a Hopper GPU runs, on the CPU: same function, other products."""
    case = Case(**{"hidden": 16, "intermediate": 8, "num_experts": 5, "rank": 4, "quantised": quantised, **changes})
    results = []
    for grouped in (False, True):
        monkeypatch.setattr(engine, "_grouped_products", lambda _, grouped=grouped: grouped)
        module, (x_TH, index_TK, w_TK) = build(case), inputs(case)
        output = experts_forward(module, x_TH, index_TK, w_TK)
        random_TH = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(9))
        gradients = torch.autograd.grad((output * random_TH).sum(), leaves_of(module, x_TH, w_TK))
        results.append([output, *gradients])
    for loop, product in zip(*results, strict=True):
        torch.testing.assert_close(loop, product, atol=1e-5, rtol=1e-5)
