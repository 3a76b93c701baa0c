"""Micro-batches: padding that is never seen, and packed documents that never see each other."""

from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import eager_attention_forward

from finetune.data.render import IGNORED
from finetune.data.tokens.collators import ROW_PLACES, Collator, needs_one_row
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


def batch_of(dataset: list[dict[str, Any]], in_one_row: bool = False) -> dict[str, Any]:
    return Collator(tiny_tokenizer(), in_one_row)(dataset)


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
    assert (
        batch["attention_mask"].tolist()
        == batch["weight"].tolist()
        == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    )
    assert batch["labels"].tolist()[1] == [IGNORED, 11, 12, IGNORED, IGNORED]
    assert batch["rows"] == ["f:11", "f:12", "f:13"]
    assert {tensor.dtype for key, tensor in batch.items() if key != "rows"} == {torch.int64}


KEYS = ["input_ids", "labels", "position_ids", "rows", "supervised", "weight"]


def test_packed_rows_lie_under_each_other_without_an_attention_mask() -> None:
    pad = tiny_tokenizer().pad_token_id
    batch = batch_of(packed_rows())
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, pad, pad, pad, pad]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert batch["weight"].tolist() == [[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist()[1] == [IGNORED, 14, 15, 16, *[IGNORED] * 4]
    assert batch["rows"] == ["f:11", "f:12", "f:13"]
    assert sorted(batch) == KEYS


def test_packed_rows_of_flash_attention_become_one_row_without_padding() -> None:
    assert [needs_one_row(name) for name in ("flash_attention_2", "sdpa", "eager")] == [True, False, False]
    batch = batch_of(packed_rows(), in_one_row=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    assert batch["weight"].tolist() == [[1] * 12]
    assert batch["rows"] == ["f:11", "f:12", "f:13"]
    assert sorted(batch) == KEYS


def test_a_token_of_a_numbered_row_has_the_same_place_in_every_batch() -> None:
    """Places are what dropout depends on; rows without a number have none."""
    rows = [{**row, "index": index} for row, index in zip(packed_rows(), (3, 70_000), strict=True)]
    wanted = [[index * ROW_PLACES + place for place in range(length)] for index, length in ((3, 8), (70_000, 4))]
    padded, alone, in_one_row = batch_of(rows), batch_of(rows[1:]), batch_of(rows, in_one_row=True)
    assert padded["places"][:1].tolist() == wanted[:1]
    assert padded["places"][1, :4].tolist() == alone["places"][0].tolist() == wanted[1]
    assert in_one_row["places"].tolist() == [wanted[0] + wanted[1]]
    assert sorted(alone) == sorted([*KEYS, "places"])


def test_a_packed_row_alone_is_the_same_in_both() -> None:
    under_each_other, in_one_row = (batch_of(packed_rows()[:1], one) for one in (False, True))
    for key in ("input_ids", "labels", "position_ids", "supervised", "weight"):
        assert torch.equal(under_each_other[key], in_one_row[key]), key


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_the_attention_mask_of_packed_rows_grows_with_their_number(
    attn_implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where attention is given it; in one row it would grow with the square."""
    sizes: list[int] = []
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, eager_attention_forward)

    def counting(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **settings: Any) -> Any:
        sizes.append(attention_mask.untyped_storage().nbytes() // attention_mask.element_size())
        return attention(module, query, key, value, attention_mask, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attn_implementation, counting)
    network, row = model(attn_implementation), packed_rows()[0]
    for count in (1, 4):
        batch = batch_of([row] * count)
        logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    layers = network.config.num_hidden_layers
    assert sizes == [8 * 8] * layers + [4 * 8 * 8] * layers


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packed_documents_get_the_logits_they_get_alone(attn_implementation: str) -> None:
    network = model(attn_implementation)
    batch = batch_of(packed_rows())
    packed = logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"])[batch["weight"].bool()]
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
    before = logits(network, input_ids=batch["input_ids"], position_ids=batch["position_ids"]).flatten(0, 1)
    changed = batch["input_ids"].clone()
    changed[0, :5] = torch.tensor([20, 21, 22, 23, 24])
    after = logits(network, input_ids=changed, position_ids=batch["position_ids"]).flatten(0, 1)
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
