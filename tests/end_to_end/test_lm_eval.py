"""lm-eval, the field's own harness, on merged models and on local tasks, without network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "data" / "lm-eval"
PROMPTS = ("turn on the kitchen light", "set the timer", "light", "ten minutes")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_mixtral(folder / "base")
    merge(save_adapter(base, folder / "adapter"), folder / "merged", show_progress=False)
    return folder / "merged"


def lm_eval(model: Path, task: str, tasks: Path, output: Path, *words: str) -> dict[str, Any]:
    """What the command measures, and each of its samples."""
    arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", task, "--include_path", str(tasks), "--output_path", str(output), "--log_samples", *words]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    measured: dict[str, Any] = json.loads(results.read_text())["results"][task]
    return {**measured, "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers makes of the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0][ids.shape[1] :]
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_lm_eval_measures_a_merged_model_on_a_local_task(merged: Path, tmp_path: Path) -> None:
    # Three answers as the model gives them and one that it does not: 75 %, neither none nor all.
    answers = [greedy(merged, prompt, 8).strip() for prompt in PROMPTS]
    rows = [{"question": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers, strict=True)]
    rows[-1]["answer"] = "something else"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"do_sample": False, "max_gen_toks": 8, "until": ["<|im_end|>"]},
        "filter_list": [{"name": "stripped", "filter": [{"function": "regex", "regex_pattern": r"(?s)^\s*(.*?)\s*$"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    result = lm_eval(merged, "tiny", tmp_path, tmp_path / "results")
    assert result["exact_match,stripped"] == 0.75


@pytest.mark.slow
def test_the_task_of_the_quickstart_asks_and_expects_what_its_rows_say(merged: Path, tmp_path: Path) -> None:
    result = lm_eval(merged, "quickstart", TASKS, tmp_path, "--apply_chat_template", "--limit", "2", "--gen_kwargs", "max_gen_toks=1")
    rows = [json.loads(line) for line in (ROOT / "data/quickstart/eval.jsonl").read_text().splitlines()]
    assert result["exact_match,none"] == 0.0
    for sample, row in zip(result["samples"], rows, strict=False):
        question, answer = (message["content"] for message in row["messages"])
        asked = sample["arguments"]["gen_args_0"]["arg_0"]
        assert asked == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert sample["target"] == answer
