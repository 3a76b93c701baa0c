"""The card of a merged model tells of the weights that lie beside it, whatever the merge did with them."""

from pathlib import Path
from typing import Any

import pytest

from finetune.merge.card import adapter_name, merged_card
from finetune.merge.report import names_and_shapes

LOGITS = {"tokens": 9, "adapter_effect_mean": 0.5, "merged_error_mean": 0.0114, "merged_error_max": 0.04}
PROOF = {"adapter_tensors": 8, "tensors": 41, "changed": 4, "moved_biases": 0, "logits": LOGITS, "not_proven": []}
REPORT: dict[str, Any] = {
    "adapters": [{"name_or_path": "runs/sft/adapter", "sha256": "a" * 64, "weight": 1.0}],
    "base": "/models/tiny",
    "base_fingerprint": "b" * 64,
    "into": "original",
    "through_nf4": 0,
    "output": "out",
    "fingerprint": "c" * 64,
    "dtypes": ["BF16"],
    "nbytes": 3 * 2**30,
    "targeted": 4,
    "added_tokens": 0,
    "whole_tensors": [],
    "untied": False,
    "parts": {},
    "proof": PROOF,
    "compare": None,
}


def card(**changes: Any) -> str:
    return merged_card({**REPORT, **changes}, [{}])


def test_a_merge_in_16_bits() -> None:
    text = card()
    assert "3.00 GiB, BF16." in text
    assert "| merged into | the original base |" in text
    assert "| tensors on disk | 41, with the names and shapes of the base |" in text
    assert "| this model is off from base + adapters by | 0.0114 in the mean, 0.04 at most |" in text
    assert "NF4" not in text
    assert "Compared on" not in text


def test_the_dequantized_base_is_named() -> None:
    text = card(into="dequantized", through_nf4=24)
    assert "| merged into | the dequantized base, 24 tensors of it through NF4 |" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"untied": True}, ", but: embedding and head, one matrix in the base, are two"),
        ({"added_tokens": 2}, ", but: embedding and head have the rows that 2 added tokens need"),
        ({"whole_tensors": ["a", "b"]}, ", but: 2 are as the adapter brings them"),
    ],
)
def test_names_and_shapes_are_the_bases_only_where_they_are(changes: dict[str, Any], said: str) -> None:
    assert names_and_shapes({**REPORT, **changes}) == f"with the names and shapes of the base{said}"
    assert f"| tensors on disk | 41, with the names and shapes of the base{said} |" in card(**changes)


def test_what_an_adapter_brings_beside_factors_has_its_rows() -> None:
    text = card(untied=True, added_tokens=2, whole_tensors=["lm_head.weight"], proof={**PROOF, "moved_biases": 3})
    assert "| added tokens | 2, with the rows that training left |" in text
    assert "| whole tensors of the adapters | lm_head.weight |" in text
    assert "| embedding and head | two matrices: the base's one cannot hold both |" in text
    assert "| correction biases of routers | 3 tensors, as training left them |" in text


def test_what_was_compared_is_shown() -> None:
    into = {"original": {"loss": 2.5, "kl": 0.02}, "dequantized": {"loss": 2.25, "kl": 0.01}}
    compare = {
        "data": "/srv/me/rows.jsonl",
        "rows": 8,
        "tokens": 99,
        "trained_loss": 2.125,
        "into": into,
        "advice": "merge --into dequantized",
    }
    text = card(compare=compare)
    assert "### Compared on rows.jsonl, 8 rows, 99 supervised tokens" in text
    assert "| base + adapters | 2.1250 | 0 |" in text
    assert "| merged into the dequantized base | 2.2500 | 0.01 |" in text
    assert "Advice: merge --into dequantized" in text
    assert "/srv" not in text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("runs/sft/adapter", "sft/adapter"),
        ("/srv/me/runs/dpo/adapter", "dpo/adapter"),
        ("/srv/me/runs/dpo/checkpoint-20", "dpo/checkpoint-20"),
        ("/srv/me/mine", "mine"),
        ("../adapter", "adapter"),
        ("adapter", "adapter"),
    ],
)
def test_an_adapter_is_called_by_its_run(folder: str, name: str) -> None:
    assert adapter_name(str(Path(folder))) == name
    assert f"| name | {name} |" in card(adapters=[{**REPORT["adapters"][0], "name_or_path": folder}])
