"""`lora.experts: auto`: which experts matter, measured where the answer is known by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import Collator
from finetune.errors import RunError, WeightsError
from finetune.moe.esft import (
    ExpertChoice,
    LayerChoice,
    batch_rows,
    choose_experts,
    draw_rows,
    measure_experts,
    read_choice,
    smallest_set,
)
from finetune.moe.families import FAMILIES, MoeLayout
from finetune.recipe import Recipe
from tests.families import CONFIGS, tiny_model
from tests.support import save_tiny_mixtral, tiny_tokenizer
from tests.unit.engine import base_model
from tests.unit.recipe_writing import RecipeFile, changed

COLLATE = Collator(tiny_tokenizer())
# Token ids by class; the padding token, 3, is of class 3.
A, B, C = 4, 5, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Mixtral whose routers give, in layer 0, tokens A to experts 0 (3/4) and 1 (1/4), B to 0 (2/3) and 2 (1/3), C
    to 2 and 1 (1/2 each), padding to 3 and 2; in layer 1 every token to experts 3 (3/4) and 2 (1/4).

    Attention and experts add nothing, so a token's class is what its embedding says, in every layer.
    """
    model = base_model(save_tiny_mixtral(tmp_path_factory.mktemp("base")), load_in_4bit=False)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight.zero_()
        embedding[torch.arange(512), torch.arange(512) % 4] = 1.0
        weights = (
            [[3.0, 1.0, 1e-6, 1e-6], [2.0, 1e-6, 1.0, 1e-6], [1e-6, 1.0, 1.0, 1e-6], [1e-6, 1e-6, 1.0, 3.0]],
            [[1e-6, 1e-6, 1.0, 3.0]] * 4,
        )
        for layer, weight in zip(model.model.layers, weights, strict=True):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            # The norm makes the one 1 an 8: the root of the hidden size.
            layer.mlp.gate.weight.zero_()[:, :4] = torch.tensor(weight).T.log() / 8
    return model


@pytest.fixture(scope="module")
def moe() -> MoeLayout:
    layout = FAMILIES["mixtral"].moe
    assert layout is not None
    return layout


def dataset(*rows: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": ids, "row": number} for number, ids in enumerate(rows, start=1)]


ROWS = dataset([A] * 6, [B, C], [A, C], [B, B])  # 6 A and 1 A, 3 B, 2 C: 12 tokens


def shares(totals: torch.Tensor) -> list[float]:
    values: list[float] = (totals / totals.sum()).tolist()
    return values


def test_the_gate_score_is_the_average_router_weight(model: Any, moe: MoeLayout) -> None:
    scores = measure_experts(model, moe, [COLLATE(ROWS)], "gate")
    assert list(scores) == ["model.layers.0", "model.layers.1"]
    expected = [7 * 3 / 4 + 3 * 2 / 3, 7 / 4 + 2 / 2, 3 / 3 + 2 / 2, 0]
    assert shares(scores["model.layers.0"]) == pytest.approx([value / 12 for value in expected], abs=1e-4)
    assert shares(scores["model.layers.1"]) == pytest.approx([0, 0, 1 / 4, 3 / 4], abs=1e-4)


def test_the_token_score_is_the_share_of_all_choices_and_exact(model: Any, moe: MoeLayout) -> None:
    scores = measure_experts(model, moe, [COLLATE(ROWS)], "token")
    assert {layer: each.tolist() for layer, each in scores.items()} == {
        "model.layers.0": [7 + 3, 7 + 2, 3 + 2, 0],
        "model.layers.1": [0, 0, 12, 12],
    }


@pytest.mark.parametrize("score", ["gate", "token"])
def test_padding_counts_for_nothing_and_the_cut_into_batches_and_processes_neither(
    model: Any, moe: MoeLayout, score: str
) -> None:
    """One padded batch; one row a batch, without padding; two processes that add up their sums."""
    whole = measure_experts(model, moe, [COLLATE(ROWS)], score)
    single = measure_experts(model, moe, [COLLATE([row]) for row in ROWS], score)
    first, second = (measure_experts(model, moe, [COLLATE(ROWS[part::2])], score) for part in (0, 1))
    for layer, total in whole.items():
        assert torch.equal(total, single[layer])
        assert torch.equal(total, first[layer] + second[layer])


def test_packed_rows_count_like_any_other(model: Any, moe: MoeLayout) -> None:
    ids = [token for row in ROWS for token in row["input_ids"]]
    positions = [position for row in ROWS for position in range(len(row["input_ids"]))]
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions, "row": [1, 2, 3, 4]}
    wanted = measure_experts(model, moe, [COLLATE(ROWS)], "token")["model.layers.0"]
    assert torch.equal(measure_experts(model, moe, [COLLATE([packed])], "token")["model.layers.0"], wanted)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_of_the_table_is_measured_alike(model_type: str) -> None:
    """Each real token has its two choices in each layer with experts, whatever stands around them."""
    family, tiny = FAMILIES[model_type], tiny_model(model_type)
    assert family.moe is not None
    rows = dataset(list(range(10, 30)), list(range(40, 48)))
    scores = measure_experts(tiny, family.moe, [COLLATE(rows)], "token")
    with_experts = [name for name, _ in tiny.named_modules() if name.endswith(f".{family.moe.experts_module}")]
    assert [f"{layer}.{family.moe.experts_module}" for layer in scores] == with_experts
    assert {int(total.sum()) for total in scores.values()} == {2 * 28}
    assert all(total.shape == (tiny.get_submodule(with_experts[0]).num_experts,) for total in scores.values())


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    settings = "  r: 8\n  experts: auto\n  experts_share: 0.8\n  experts_score: token\n  experts_tokens: 1000"
    return RecipeFile(tmp_path, monkeypatch).load(changed(("  r: 8", settings)))


def test_the_choice_says_what_it_was_made_from(model: Any, moe: MoeLayout, recipe: Recipe, tmp_path: Path) -> None:
    """Choices in layer 0: 10, 9, 5 and 0 of 24; two experts hold 19/24 = 79 %, so that 80 % needs three."""
    choice = choose_experts(model, moe, ROWS, COLLATE, recipe)
    assert choice.experts == {"model.layers.0": (0, 1, 2), "model.layers.1": (2, 3)}
    assert choice.lines() == [
        "layer 0: 3 of 4 experts, 100.0 % of the tokens' choices",
        "layer 1: 2 of 4 experts, 100.0 % of the tokens' choices",
        "adapted: 5 of 8 experts, 62.5 % of the experts' parameters (measured on 12 tokens of 4 rows)",
    ]
    choice.write(tmp_path / "experts.json")
    assert read_choice(tmp_path / "experts.json") == choice
    written = json.loads((tmp_path / "experts.json").read_text())
    assert (written["score"], written["share"], written["rows"], written["tokens"]) == ("token", 0.8, 4, 12)
    assert written["layers"][0]["scores"] == pytest.approx([10 / 24, 9 / 24, 5 / 24, 0])
    assert (written["adapted"], written["layers"][1]["reached"]) == (0.625, 1.0)


def test_measuring_leaves_model_and_random_numbers_as_they_were(
    model: Any, moe: MoeLayout, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model makes noise in training: what is measured is the model as it answers."""
    monkeypatch.setattr(model.model.layers[0].mlp, "jitter_noise", 0.5)
    model.train()
    before = torch.get_rng_state()
    choose_experts(model, moe, ROWS, COLLATE, recipe)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_a_weight_that_is_not_finite_names_layer_and_rows(model: Any, moe: MoeLayout) -> None:
    gate = model.model.layers[1].mlp.gate.weight
    kept = gate.detach().clone()
    gate.data.fill_(float("nan"))
    with pytest.raises(RunError) as caught:
        measure_experts(model, moe, [COLLATE(ROWS)], "gate")
    gate.data.copy_(kept)
    assert str(caught.value) == (
        "model.layers.1: a router weight is not finite while experts are measured; rows: "
        "1, 2, 3, 4; look at these rows, or use model.dtype bfloat16 instead of float16"
    )


def test_rows_are_drawn_with_the_seed_until_there_are_tokens_enough() -> None:
    rows = dataset(*[[A] * (1 + number % 5) for number in range(40)])
    drawn = draw_rows(rows, 20, seed=1)
    assert drawn == {row: len(rows[row]["input_ids"]) for row in drawn}
    assert 20 <= sum(drawn.values()) < 25
    assert draw_rows(rows, 20, seed=1) == drawn
    assert draw_rows(rows, 20, seed=2) != drawn
    assert set(draw_rows(rows, 10**6, seed=1)) == set(range(40))


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed() -> None:
    lengths = dict(enumerate([7, 1, 3, 8, 2, 2]))
    assert batch_rows(lengths, limit=8) == [[3], [0], [2, 4], [5, 1]]


@pytest.mark.parametrize(
    ("scores", "share", "experts"),
    [
        ([8, 2], 0.8, (0,)),
        ([8, 2], 0.81, (0, 1)),
        ([1, 9], 1e-9, (1,)),
        ([5, 0, 5], 1.0, (0, 2)),
        ([1, 1, 1, 1], 0.5, (0, 1)),
        ([2**62, 1], 1.0, (0, 1)),
        ([1, 2, 3, 4], 0.7, (2, 3)),
        ([3, 3, 4], 0.7, (0, 2)),
    ],
    ids=[
        "exactly the share",
        "just above it",
        "a tiny share is one expert",
        "all of it is all that were used",
        "of equals the first",
        "one count of 4.6e18",
        "the best two",
        "the best and the first of two equals",
    ],
)
def test_the_smallest_set_that_holds_the_share(scores: list[int], share: float, experts: tuple[int, ...]) -> None:
    assert smallest_set(scores, share) == experts


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12).filter(any), st.floats(0.001, 1))
def test_a_set_holds_the_share_and_would_not_without_its_least_expert(scores: list[int], share: float) -> None:
    chosen = smallest_set(scores, share)
    held = sum(scores[expert] for expert in chosen)
    assert held >= share * sum(scores) * (1 - 1e-12)
    assert held - min(scores[expert] for expert in chosen) <= share * sum(scores) * (1 + 1e-12)


def test_a_model_without_the_experts_that_the_table_names_is_an_error(model: Any, moe: MoeLayout) -> None:
    with pytest.raises(WeightsError, match=r"mlp.specialists: the loaded model has no experts of this name"):
        measure_experts(model, replace(moe, experts_module="mlp.specialists"), [COLLATE(ROWS)], "gate")


def test_a_layer_that_no_token_reaches_is_an_error(model: Any, moe: MoeLayout, recipe: Recipe) -> None:
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _module, args: (args[0], torch.full_like(args[1], 4), args[2])
    )
    with pytest.raises(RunError, match=r"model.layers.0: no expert of this layer was given weight by any measured tok"):
        choose_experts(model, moe, ROWS, COLLATE, recipe)
    handle.remove()


CHOICE = ExpertChoice("gate", 0.5, 4, 12, (LayerChoice("model.layers.0", (0.6, 0.4), (0,)),))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"layers": [{"layer": "model.layers.0", "scores": [0.6, 0.4], "experts": [2]}]}, "an unknown score, layer or"),
        ({"layers": [{"layer": "model.layers.0", "scores": [0.6, 0.4], "experts": []}]}, "an unknown score, layer or"),
        ({"layers": []}, "an unknown score, layer or expert"),
        ({"score": "loss"}, "an unknown score, layer or expert"),
        ({"layers": [{"layer": "model.layers.0"}]}, "KeyError('scores')"),
    ],
)
def test_a_file_that_is_no_choice_is_refused(tmp_path: Path, change: dict[str, Any], got: str) -> None:
    path = tmp_path / "experts.json"
    path.write_text(json.dumps({**CHOICE.as_dict(), **change}))
    with pytest.raises(RunError) as caught:
        read_choice(path)
    assert str(caught.value).startswith(f"{path}: not a choice of experts; got {got}")
    assert "start anew in another output_dir: experts that are measured again may be others" in str(caught.value)


def test_a_missing_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"experts.json: the run that is to be continued has no choice of experts; start"
    ):
        read_choice(tmp_path / "experts.json")
