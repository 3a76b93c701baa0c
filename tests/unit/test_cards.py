"""The card of a merged model tells of the weights that lie beside it, whatever the merge did with them."""

from pathlib import Path
from typing import Any

import pytest

from finetune.cards import adapter_card, adapter_name
from finetune.merge.report import names_and_shapes, report_card, report_lines

LOGITS = {"tokens": 9, "adapter_effect_mean": 0.5, "merged_error_mean": 0.0114, "merged_error_max": 0.04}
PROOF = {"adapter_tensors": 8, "tensors": 41, "changed": 4, "moved_biases": 0, "logits": LOGITS, "not_proven": []}
REPORT: dict[str, Any] = {
    "adapters": [{"name_or_path": "runs/sft/adapter", "sha256": "a" * 64, "weight": 1.0, "base_recorded": True}],
    "base": "/models/tiny",
    "base_fingerprint": "b" * 64,
    "into": "original",
    "through_nf4": 0,
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
    return report_card({**REPORT, **changes}, [{}], "out")


def test_a_merge_in_16_bits() -> None:
    text = card()
    assert "3.00 GiB, BF16." in text
    assert "| merged into | original base |  |" in text
    assert "| tensors on disk | 41 | 3.00 GiB BF16, with the names and shapes of the base |" in text
    assert "| error of the merge | 0.0114 | mean difference from base + adapter, 0.04 max |" in text
    assert "NF4" not in text
    assert "Compared on" not in text


def test_terminal_and_inspect_show_the_rows_of_the_card() -> None:
    report = {**REPORT, "into": "dequantized", "through_nf4": 24, "added_tokens": 2, "untied": True}
    text, lines = report_card(report, [{}], "out"), dict(report_lines(report))
    assert lines["base fingerprint"] == f"{'b' * 12}, matches the adapter's record"
    assert lines["adapter"] == f"1 x runs/sft/adapter, SHA-256 {'a' * 12}"
    shown = lines.keys() - {"base fingerprint", "adapter"}
    assert len(shown) == 9
    for label in shown:
        value, _, remark = lines[label].partition(", ")
        assert f"| {label} | {value} | {remark} |" in text
    assert "runs/sft/adapter" not in text


def test_the_dequantized_base_is_named() -> None:
    text = card(into="dequantized", through_nf4=24)
    assert "| merged into | dequantized base | 24 tensors through NF4 |" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"untied": True}, ", but: embedding and head, one matrix in the base, are two"),
        ({"added_tokens": 2}, ", but: embedding and head have rows for 2 added tokens"),
        ({"whole_tensors": ["a", "b"]}, ", but: 2 are the adapter's"),
    ],
)
def test_names_and_shapes_are_the_bases_only_where_they_are(changes: dict[str, Any], said: str) -> None:
    assert names_and_shapes({**REPORT, **changes}) == f"with the names and shapes of the base{said}"
    assert f"| tensors on disk | 41 | 3.00 GiB BF16, with the names and shapes of the base{said} |" in card(**changes)


def test_what_an_adapter_brings_beside_factors_has_its_rows() -> None:
    text = card(untied=True, added_tokens=2, whole_tensors=["lm_head.weight"], proof={**PROOF, "moved_biases": 3})
    assert "| added tokens | 2 | with the rows that training left |" in text
    assert "| whole tensors | 1 | lm_head.weight |" in text
    assert "| embedding, head | two matrices | the base's one cannot hold both |" in text
    assert "| router biases | 3 tensors | as training left them |" in text


def test_what_was_compared_is_shown() -> None:
    into = {"original": {"loss": 2.5, "kl": 0.02}, "dequantized": {"loss": 2.25, "kl": 0.01}}
    compare = {
        "data": "/srv/me/rows.jsonl",
        "rows": 8,
        "tokens": 99,
        "trained_loss": 2.125,
        "into": into,
        "shift": {"experts": 10.5},
        "advice": "merge --into dequantized",
    }
    text = card(compare=compare)
    assert "### Compared on rows.jsonl\n" in text
    assert "| base + adapter | loss 2.1250 | on 99 supervised tokens of 8 rows |" in text
    assert "| into dequantized base | loss 2.2500 | KL 0.01 per token from the adapter |" in text
    assert "| NF4 rounding error, experts | 10.5 | x the norm of the delta |" in text
    assert "| advice | merge --into dequantized |" in text
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


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (["rendered"], "`ab`, not used in training: the rows were already rendered |"),
        (["rendered", "messages"], "`ab` |"),
        (["messages"], "`ab` |"),
    ],
)
def test_the_card_says_where_training_did_not_go_through_the_template(formats: list[str], said: str) -> None:
    train = [{"path": f"{name}.jsonl", "format": name} for name in formats]
    record = {"base": {"name_or_path": "b"}, "recipe": {"data": {"train": train if len(train) > 1 else train[0]}}}
    text = adapter_card({**record, "template_sha256": "ab", "template_day": "2025-03-01"})
    assert f"| chat template (SHA-256) | {said}" in text
    assert "| date that the chat template wrote | 2025-03-01 |" in text


def test_cards_and_reports_say_the_variables_of_the_template() -> None:
    args = {"enable_thinking": False}
    record = {"base": {"name_or_path": "b"}, "recipe": {"data": {"train": {"path": "rows.jsonl"}}}}
    said = 'Prompts must be rendered with `chat_template_kwargs={"enable_thinking": false}`, as in training'
    assert said in adapter_card({**record, "template_args": args})
    assert said in report_card(REPORT, [{**record, "template_args": args}], "out")
    assert "chat_template_kwargs" not in adapter_card(record)
    report = {**REPORT, "adapters": [{**REPORT["adapters"][0], "template_args": args}]}
    assert dict(report_lines(report))["prompts with"].startswith('chat_template_kwargs={"enable_thinking": false}')
