"""A prompt run once gives both answers what they get alone, on every architecture that may share it."""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from finetune.data.tokens.collators import PairLayout
from finetune.methods.pairs import prompt_sharing_refusal, score_pairs
from finetune.moe.families import FAMILIES, Family
from tests.families import CONFIGS, save_tiny, tiny_config
from tests.support import save_tiny_llama, save_tiny_mistral
from tests.unit.pairs import (
    LONGEST,
    PAIRS,
    assert_same_gradients,
    gradients,
    pair_batch,
    scores_alone,
    scoring_model,
    token_pair,
)

SAVE = {"llama": save_tiny_llama, "mistral": save_tiny_mistral} | {
    model_type: partial(save_tiny, model_type) for model_type in CONFIGS
}
Specimen = tuple[Family, Any]


@pytest.fixture(scope="module", params=list(FAMILIES))
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    """A family and a tiny 4-bit model of it, adapted in all its parts."""
    family = FAMILIES[request.param]
    folder = SAVE[request.param](tmp_path_factory.mktemp(request.param))
    return family, scoring_model(folder, load_in_4bit=True, targets=list(family.targets))


def test_every_layout_gives_the_scores_and_gradients_of_one_document_at_a_time(specimen: Specimen) -> None:
    """The reference is the model's own logits: TRL's fused head computes the same on every architecture."""
    family, model = specimen
    attention = family.attn_implementations[0]
    refusal = prompt_sharing_refusal(family, model.config, attention, LONGEST)
    alone = scores_alone(model)
    wanted = gradients(model, alone)
    layouts: list[PairLayout] = [
        "padded",
        *(() if family.unpackable else ("packed", "flat")),
        *(() if refusal else ("shared",)),
    ]
    for layout in layouts:
        scores = score_pairs(model, pair_batch(layout), attention).log_probs
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=1e-5)
        # Sums of float32 in another order: up to 1.6e-5 was seen, in layers that carry a state along the row.
        assert_same_gradients(gradients(model, scores), wanted, tolerance=3e-5)


def test_a_changed_pair_changes_nothing_in_its_neighbours(specimen: Specimen) -> None:
    family, model = specimen
    if family.unpackable:
        pytest.skip(family.unpackable)
    changed = [token_pair(9, 4, 7, 11), *PAIRS[1:]]
    with torch.no_grad():
        before, after = (
            score_pairs(model, pair_batch("shared", pairs), family.attn_implementations[0]).log_probs.unflatten(
                0, (2, 3)
            )
            for pairs in (PAIRS, changed)
        )
    torch.testing.assert_close(after[:, 1:], before[:, 1:], atol=2e-6, rtol=0)
    assert (after[:, 0] - before[:, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "model_type", [name for name, family in FAMILIES.items() if "eager" in family.attn_implementations[1:]]
)
def test_eager_attention_sees_the_same(model_type: str, tmp_path: Path) -> None:
    family = FAMILIES[model_type]
    if family.unpackable:
        pytest.skip(family.unpackable)
    model = scoring_model(SAVE[model_type](tmp_path), targets=["attention"])
    model.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        scores = score_pairs(model, pair_batch("shared"), "eager").log_probs
        torch.testing.assert_close(scores, scores_alone(model), atol=1e-5, rtol=1e-5)


REFUSALS = {
    "gpt_oss": "transformers 5.24 does not tell its attention where a row begins",
    **dict.fromkeys(
        ("qwen3_next", "jamba", "minimax"), "its recurrent layers carry their state from one row into the next"
    ),
}


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_who_may_share(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]() if model_type not in CONFIGS else tiny_config(model_type)
    refusal = partial(prompt_sharing_refusal, FAMILIES[model_type], config)
    assert refusal("sdpa", LONGEST) == refusal("eager", LONGEST) == REFUSALS.get(model_type)
    wanted = REFUSALS.get(model_type, "flash_attention_2 takes no mask of who sees whom (use sdpa or eager)")
    assert refusal("flash_attention_2", LONGEST) == wanted


# How each architecture is given layers that look back a few tokens only.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mixtral": {},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 9},
    "qwen3_moe": {"use_sliding_window": True},
    "phimoe": {},
    "dots1": {"max_window_layers": 1},
    "exaone_moe": {},
    "mimo_v2_flash": {},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
}


def test_every_architecture_with_a_window_is_tried() -> None:
    windowed = {
        name
        for name, family in FAMILIES.items()
        if not family.unpackable and "sliding_window" in {field.name for field in fields(CONFIG_MAPPING[name])}
    }
    assert windowed == set(WINDOWED)
    assert not any(
        "attention_chunk_size" in {field.name for field in fields(CONFIG_MAPPING[name])} for name in FAMILIES
    )


@pytest.mark.parametrize("model_type", list(WINDOWED))
@pytest.mark.parametrize("window", [6, LONGEST - 1, LONGEST])
def test_a_window_that_the_mask_would_lose_is_refused_to_the_token(
    model_type: str, window: int, tmp_path: Path
) -> None:
    family = FAMILIES[model_type]
    folder = SAVE[model_type](tmp_path, sliding_window=window, **WINDOWED[model_type])
    model = scoring_model(folder, targets=["attention"])
    attention = family.attn_implementations[0]
    refusal = prompt_sharing_refusal(family, model.config, attention, LONGEST)
    with torch.no_grad():
        shared, flat, alone = (
            score_pairs(model, pair_batch("shared"), attention).log_probs,
            score_pairs(model, pair_batch("flat"), attention).log_probs,
            scores_alone(model),
        )
    torch.testing.assert_close(flat, alone, atol=1e-5, rtol=1e-5)
    if window == LONGEST:
        assert refusal is None
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
        return
    assert refusal == (
        f"some of its layers look back {window} tokens only, which the mask of shared prompts does not say, and a row "
        f"may have {LONGEST}"
    )
    assert window > 6 or (shared - alone).abs().max() > 0.1
