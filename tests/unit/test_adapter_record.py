"""`finetune.json`: one model of what is in it, whichever version or tool wrote it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from finetune.adapters.record import RECORD_FILE, AdapterRecord, read_record
from finetune.errors import WeightsError

# As the first version of this toolkit wrote it, before there were added tokens, data, metrics and router biases.
FIRST_FORMAT: dict[str, Any] = {
    "format": 1,
    "base": {"name_or_path": "models/base", "fingerprint": "0123"},
    "layout": {"expert_lora": "A:expert-major,B:rank-major"},
    "quantization": "nf4",
    "dtype": "bfloat16",
    "recipe": {"output_dir": "runs/one", "seed": 0, "lora": {"targets": ["attention"], "r": 4, "lora_alpha": 8.0}},
    "versions": {"moe-finetune": "0.1.0", "peft": "0.21.2"},
}
NOW: dict[str, Any] = {
    **FIRST_FORMAT,
    "base": {
        **FIRST_FORMAT["base"],
        "made_from": {"base_fingerprint": "4567", "into": "original", "adapters": [{"sha256": "89", "weight": 0.5}]},
    },
    "experts": None,
    "added_tokens": {"<|turn|>": 384},
    "adapter": {"name_or_path": "runs/sft/adapter", "sha256": "89"},
    "router_bias": "router_bias.safetensors",
    "data": {"train": [{"name": "rows.jsonl", "rows": 4}]},
    "metrics": {"train": {"step": 4, "loss": 1.5}},
    "template_sha256": "ab",
    "template_day": "2025-03-01",
    "template_args": {"enable_thinking": False, "reasoning_effort": "low"},
}


def write(folder: Path, content: Any) -> Path:
    (folder / RECORD_FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("content", [FIRST_FORMAT, NOW], ids=["first", "now"])
def test_what_was_written_is_read_and_written_again(content: dict[str, Any], tmp_path: Path) -> None:
    record = read_record(write(tmp_path, content))
    assert record.as_dict() == content
    record.write(tmp_path)
    assert json.loads((tmp_path / RECORD_FILE).read_text()) == content
    assert read_record(tmp_path) == record


def test_a_record_of_a_later_version_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    assert read_record(write(tmp_path, {**FIRST_FORMAT, "later": [1]})).as_dict() == FIRST_FORMAT


def test_an_adapter_of_another_tool_has_an_empty_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) == AdapterRecord()
    assert read_record(tmp_path).as_dict() == {}


def test_no_quantization_is_not_the_same_as_nothing_said_about_it(tmp_path: Path) -> None:
    assert not AdapterRecord().says_quantization
    assert read_record(write(tmp_path, {"quantization": None})).says_quantization


def test_metrics_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    metrics = read_record(write(tmp_path, {"metrics": {"train": {"loss": math.nan}}})).metrics
    assert metrics is not None
    assert math.isnan(float(str(metrics["train"]["loss"])))


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    content = {
        "base": {"made_from": {"base_fingerprint": 1, "adapters": [{"sha256": "89"}]}},
        "added_tokens": {"a": True},
        "recipe": {"lora": "x"},
        "versions": None,
    }
    with pytest.raises(WeightsError) as caught:
        read_record(write(tmp_path, content))
    do = "fetch or copy the adapter's folder again, or save the adapter again"
    assert str(caught.value).replace(f"{tmp_path / RECORD_FILE}: ", "").splitlines() == [
        f"base.made_from.base_fingerprint: has the wrong type (expected text); got 1; {do}",
        f"base.made_from.adapters.0.weight: is missing; {do}",
        f"added_tokens.a: has the wrong type (expected a whole number); got true; {do}",
        f'recipe.lora: has the wrong type (expected an object); got "x"; {do}',
    ]


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object")])
def test_a_file_that_is_no_json_object(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(WeightsError, match=f"{RECORD_FILE}: {message}; got .*; fetch or copy the file again"):
        read_record(tmp_path)


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AdapterRecord().dtype = "float32"
