"""Micro-batches: padding that is never seen, and packed documents that never see each other."""

from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from finetune.data.render import IGNORED
from finetune.data.tokens.collators import Collator
from tests.support import tiny_mixtral_config, tiny_tokenizer

ROWS = [([5, 6, 7, 8, 9], "f:11"), ([10, 11, 12], "f:12"), ([13, 14, 15, 16], "f:13")]


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": ids, "labels": [IGNORED, *ids[1:]], "row": row} for ids, row in ROWS]


def packed_rows() -> list[dict[str, Any]]:
    """The same rows in two sequences of at most 8 tokens."""
    first, second, third = rows()
    return [
        {
            **{key: first[key] + second[key] for key in ("input_ids", "labels")},
            "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
            "row": [first["row"], second["row"]],
        },
        {**third, "position_ids": [0, 1, 2, 3], "row": [third["row"]]},
    ]


def batch_of(dataset: list[dict[str, Any]]) -> dict[str, Any]:
    return Collator(tiny_tokenizer())(dataset)


def model(attn_implementation: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM._from_config(tiny_mixtral_config(), attn_implementation=attn_implementation).eval()


def logits(network: Any, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(**batch, use_cache=False).logits
    return result


def test_rows_are_padded_on_the_right_with_pads_that_are_masked_and_carry_no_loss() -> None:
    pad = tiny_tokenizer().pad_token_id
    batch = batch_of(rows())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, pad, pad], [13, 14, 15, 16, pad]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 11, 12, IGNORED, IGNORED]
    assert batch["rows"] == ["f:11", "f:12", "f:13"]
    assert {tensor.dtype for key, tensor in batch.items() if key != "rows"} == {torch.int64}


def test_packed_rows_become_one_flat_row_without_an_attention_mask() -> None:
    batch = batch_of(packed_rows())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert batch["rows"] == ["f:11", "f:12", "f:13"]
    assert sorted(batch) == ["input_ids", "labels", "position_ids", "rows", "supervised"]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packed_documents_get_the_logits_they_get_alone(attn_implementation: str) -> None:
    network = model(attn_implementation)
    batch = batch_of(packed_rows())
    packed = logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
    alone = torch.cat([logits(network, input_ids=torch.tensor([ids]))[0] for ids, _ in ROWS])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_padded_rows_get_the_logits_they_get_alone(attn_implementation: str) -> None:
    network = model(attn_implementation)
    batch = batch_of(rows())
    padded = logits(network, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, (ids, _) in zip(padded, ROWS, strict=True):
        alone = logits(network, input_ids=torch.tensor([ids]))[0]
        torch.testing.assert_close(row[: len(ids)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_changed_document_changes_nothing_in_its_neighbours(attn_implementation: str) -> None:
    network = model(attn_implementation)
    batch = batch_of(packed_rows())
    before = logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0]
    changed = batch["input_ids"].clone()
    changed[0, :5] = torch.tensor([20, 21, 22, 23, 24])
    after = logits(network, input_ids=changed, position_ids=batch["position_ids"])[0]
    # Not to the bit: how many rows an expert has may decide, on some processors, how its products are rounded.
    torch.testing.assert_close(before[5:], after[5:], atol=1e-5, rtol=1e-5)
    assert (before[:5] - after[:5]).abs().max() > 0.1


@pytest.mark.parametrize("wrong", ["an attention mask", "a cache"])
def test_with_a_mask_or_a_cache_documents_would_leak_which_is_why_there_is_neither(wrong: str) -> None:
    network = model("sdpa")
    batch = batch_of(packed_rows())
    right = logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    mask = torch.ones_like(batch["input_ids"]) if wrong == "an attention mask" else None
    with torch.no_grad():
        leaking = network(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask,
            use_cache=wrong == "a cache",
        ).logits
    assert (right - leaking).abs().max() > 1e-3
