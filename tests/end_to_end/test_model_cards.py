"""What adapter and merged model say of themselves, after a real training: true figures, and no path of this machine."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import finetune
from finetune.adapters.lineage import TrainedTemplate, trained_template
from finetune.adapters.record import read_record
from finetune.cards import public_name
from finetune.data.sources import open_files
from finetune.export import export
from finetune.inspect import inspect
from finetune.merge import merge
from finetune.merge.report import report_card
from finetune.recipe import load_recipe
from finetune.run import read_metrics
from finetune.train import train
from tests.end_to_end.workspaces import write_workspace
from tests.support import CHATML, save_tiny_mixtral


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four steps with an evaluation."""
    folder = tmp_path_factory.mktemp("workspace")
    base = save_tiny_mixtral(folder / "tiny-moe")
    (base / "chat_template.jinja").write_text("{% if quick %}be quick {% endif %}" + CHATML, encoding="utf-8")
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 500], "temperature": 0.5}')
    rows = {"path": str(folder / "rows.jsonl"), "format": "prompt_completion"}
    sections: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base), "load_in_4bit": True, "dtype": "float32", "pad_token": "<|im_end|>"},
        "lora": {"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8},
        "router": {"router_aux_loss_coef": 0.1},
        "data": {"train": rows, "eval": dict(rows), "max_length": 128, "template_args": {"quick": True}},
    }
    write_workspace(folder, **sections)
    return train(load_recipe(folder / "recipe.yaml", ["training.save_steps=null", "training.logging_steps=1"]), [])


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(merge(run, tmp_path_factory.mktemp("merged") / "tiny-merged", show_progress=False).output)


@pytest.fixture(scope="module")
def report(merged: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((merged / "merge-report.json").read_text())
    return report


def read_card(text: str) -> tuple[Mapping[str, Any], str]:
    """Front matter and text, as the hub's own library reads them."""
    card = ModelCard(text)
    data: Mapping[str, Any] = vars(card.data)
    return data, card.text


def test_the_adapter_records_data_metrics_template_and_versions(run: Path) -> None:
    record = json.loads((run / "adapter" / "finetune.json").read_text())
    rows = run.parent / "rows.jsonl"
    audit = json.loads((run / "audit.json").read_text())["rows"]
    for split in ("train", "eval"):
        (named,) = record["data"][split]
        assert named["name"] == str(rows)
        assert (named["rows"], named["tokens"]) == (34, audit[split]["tokens"])
        assert named["content"] == open_files(str(rows)).fingerprint()
        assert named["digest"] == audit[split]["sets"][0]["digest"]
    lines = read_metrics(run / "metrics.jsonl")
    assert record["metrics"]["train"]["loss"] == [line["loss"] for line in lines if "loss" in line][-1]
    assert record["metrics"]["train"]["step"] == record["metrics"]["eval"]["step"] == 4
    assert record["metrics"]["eval"]["eval_loss"] == [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    template = AutoTokenizer.from_pretrained(run / "adapter").chat_template
    assert record["template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert record["versions"]["moe-finetune"] == finetune.__version__
    assert {"peft", "torch", "transformers", "trl", "bitsandbytes"} < record["versions"].keys()


def test_adapter_and_merged_model_say_how_prompts_are_rendered_and_where_answers_end(
    run: Path, merged: Path, report: dict[str, Any]
) -> None:
    """The tokenizer's EOS is no token of the base's own list, which may hold ids that no text has."""
    for folder in (run / "adapter", merged):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings == {"eos_token_id": [2, 0, 500], "temperature": 0.5, "pad_token_id": 2}
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0, 500]
        assert AutoTokenizer.from_pretrained(folder).pad_token == "<|im_end|>"
        assert '`chat_template_kwargs={"quick": true}`' in (folder / "README.md").read_text()
    config = AutoConfig.from_pretrained(merged)
    assert (config.eos_token_id, config.pad_token_id) == (2, 2)
    assert read_record(run / "adapter").template_args == report["adapters"][0]["template_args"] == {"quick": True}
    assert re.search(r'its variables +\{"quick": true\}', inspect(run / "adapter"))
    assert trained_template(merged) == TrainedTemplate(None, {"quick": True})


def test_the_adapters_readme_is_true_and_has_no_placeholder(run: Path) -> None:
    text = (run / "adapter" / "README.md").read_text()
    record = json.loads((run / "adapter" / "finetune.json").read_text())
    data, body = read_card(text)
    assert data["base_model"] == "tiny-moe"
    assert data["library_name"] == "peft"
    assert {"lora", "sft"} <= set(data["tags"])
    assert "More Information Needed" not in text
    assert f"{record['metrics']['eval']['eval_loss']:.6g}" in body
    assert record["data"]["train"][0]["content"] in body
    assert str(run.parent) not in text


def test_the_card_of_a_merged_model_holds_recipe_data_metrics_proof_and_versions(
    run: Path, report: dict[str, Any]
) -> None:
    record = read_record(run / "adapter").as_dict()
    text = report_card(report, [record], "tiny-merged")
    data, body = read_card(text)
    assert data["base_model"] == "tiny-moe"
    assert data["library_name"] == "transformers"
    assert {"moe-finetune", "merged", "sft"} <= set(data["tags"])
    assert "# tiny-merged" in body
    assert "NOT PROVEN" not in body
    logits = report["proof"]["logits"]
    for figure in (logits["adapter_effect_mean"], logits["merged_error_max"]):
        assert f"{figure:.3g}" in body
    for fact in (report["base_fingerprint"], report["fingerprint"], report["adapters"][0]["sha256"]):
        assert fact in body
    assert record["template_sha256"] in body
    assert f"transformers {record['versions']['transformers']}" in body
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    wanted = record["recipe"]
    assert recipe["training"] == wanted["training"]
    assert recipe["lora"] == wanted["lora"]
    assert recipe["data"]["train"]["path"] == "rows.jsonl"
    assert recipe["model"]["name_or_path"] == "tiny-moe"
    assert str(run.parent) not in text
    assert "/tmp" not in text


def test_a_model_that_was_not_proven_says_so_before_anything_else(run: Path, report: dict[str, Any]) -> None:
    missing = ["that the merged model gives the logits of base + adapter"]
    unproven = {**report, "proof": {**report["proof"], "changed": None, "logits": None, "not_proven": missing}}
    data, body = read_card(report_card(unproven, [read_record(run / "adapter").as_dict()], "tiny-merged"))
    assert "not-proven" in data["tags"]
    assert body.lstrip().startswith("> **NOT PROVEN.**")
    assert missing[0] in body.partition("# tiny-merged")[0]
    assert "tensors changed" not in body


def test_an_adapter_without_a_record_has_a_card_that_says_it(report: dict[str, Any]) -> None:
    body = read_card(report_card(report, [{}], "tiny-merged"))[1]
    assert "How it was trained is not recorded." in body


def test_an_older_record_without_data_and_metrics_has_a_card(run: Path, report: dict[str, Any]) -> None:
    record = read_record(run / "adapter").as_dict()
    older = {key: value for key, value in record.items() if key not in ("data", "metrics", "template_sha256")}
    body = read_card(report_card(report, [older], "tiny-merged"))[1]
    assert "### Recipe" in body
    assert "### Data" not in body


def test_several_adapters_each_have_their_part_and_their_weight(run: Path, report: dict[str, Any]) -> None:
    first = report["adapters"][0]
    several = {**report, "adapters": [first, {**first, "weight": 0.5, "sha256": "f" * 64}]}
    body = read_card(report_card(several, [read_record(run / "adapter").as_dict(), {}], "tiny-merged"))[1]
    assert "## Adapter 1" in body
    assert "0.5" in body.partition("## Adapter 2")[2]


@pytest.mark.parametrize(
    ("name", "folder", "shown"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "/cache/models--mistralai--Mixtral-8x7B-v0.1/snapshots/abc", None),
        ("models/quickstart-moe", "/srv/me/project/models/quickstart-moe", "quickstart-moe"),
        ("models/quickstart-moe", "models/quickstart-moe", "quickstart-moe"),
        ("/srv/me/bases/moe", "/srv/me/bases/moe", "moe"),
        ("../bases/moe/", "../bases/moe", "moe"),
    ],
)
def test_of_a_base_only_a_hub_id_or_the_folders_name_is_shown(name: str, folder: str, shown: str | None) -> None:
    assert public_name(name, folder) == (shown or name)


def test_the_folder_for_vllm_has_a_card_too(run: Path, tmp_path: Path) -> None:
    export(run / "adapter", tmp_path / "lora", "vllm")
    text = (tmp_path / "lora" / "README.md").read_text()
    data, body = read_card(text)
    assert data["base_model"] == "tiny-moe"
    assert "--max-lora-rank 8" in body
    assert str(run.parent) not in text
