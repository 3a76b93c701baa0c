"""lm-eval, the field's own harness, on merged models and on local tasks, without network."""

import json
import os
import shutil
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
QUICKSTART = ROOT / "data" / "lm-eval" / "quickstart.yaml"
PROMPTS = ("turn on the kitchen light", "set the timer", "light", "ten minutes")
TASK: dict[str, Any] = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"do_sample": False, "max_gen_toks": 8, "until": ["<|im_end|>"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_mixtral(folder / "base")
    merge(save_adapter(base, folder / "adapter"), folder / "merged", show_progress=False)
    return folder / "merged"


@pytest.fixture(scope="module")
def results(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command measures on two tasks, `<task>` and `<task> samples`."""
    tasks, output = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("results")
    # Three answers as the model gives them and one that it does not: 75 %, neither none nor all.
    rows = [{"question": prompt, "answer": greedy(merged, prompt, 8)} for prompt in PROMPTS]
    rows[-1]["answer"] = "something else"
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tiny.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}}})
    )
    shutil.copy(QUICKSTART, tasks)
    arguments = ["--model", "hf", "--model_args", f"pretrained={merged},dtype=float32", "--device", "cpu"]
    arguments += ["--tasks", "tiny,quickstart", "--include_path", str(tasks), "--apply_chat_template"]
    arguments += ["--output_path", str(output), "--log_samples", "--limit", str(len(PROMPTS))]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lm_eval", "run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = output.rglob("results_*.json")
    samples = {path.name.split("_")[1]: path.read_text().splitlines() for path in output.rglob("samples_*.jsonl")}
    measured: dict[str, Any] = json.loads(file.read_text())["results"]
    return measured | {f"{task} samples": [json.loads(line) for line in lines] for task, lines in samples.items()}


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers makes of the prompt as a user's turn."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0][ids.shape[1] :]
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_lm_eval_measures_a_merged_model_on_a_local_task(results: dict[str, Any]) -> None:
    assert results["tiny"]["exact_match,none"] == 0.75


@pytest.mark.slow
def test_the_task_of_the_quickstart_asks_and_expects_what_its_rows_say(results: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (ROOT / "data/quickstart/eval.jsonl").read_text().splitlines()]
    assert results["quickstart"]["exact_match,none"] == 0.0
    assert len(results["quickstart samples"]) == len(PROMPTS)
    for sample in results["quickstart samples"]:
        question, answer = (message["content"] for message in rows[sample["doc_id"]]["messages"])
        asked = sample["arguments"]["gen_args_0"]["arg_0"]
        assert asked == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert sample["target"] == answer
