"""Memory that is used up: the message, and its advice, which can be followed and is not followed already."""

import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.cli import main as command
from finetune.errors import RunError
from finetune.failures import out_of_memory
from finetune.failures.advice import savings
from finetune.failures.memory import is_out_of_memory, memory_limit
from finetune.progress import PROGRESS, Progress
from finetune.recipe import load_recipe

RECIPE = """\
output_dir: run
model: {name_or_path: model, load_in_4bit: false, dtype: float32}
lora: {targets: [attention, experts], r: 16, lora_alpha: 16}
router: {router_aux_loss_coef: 0.02}
method: {kind: sft}
data:
  train: {path: rows.jsonl, format: messages}
  max_length: 4096
training:
  max_steps: 30
  learning_rate: 1e-3
  global_batch_size: 16
  per_device_train_batch_size: 8
  gradient_checkpointing: none
"""
PAIRS = RECIPE.replace("{kind: sft}", "{kind: dpo, beta: 0.1, loss_type: [sigmoid], prompt_sharing: 'off'}").replace(
    "messages", "preference"
)
MIXTRAL = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_experts_per_tok": 2,
    "num_attention_heads": 32,
}
PARTS = [
    {"part": "attention", "parameters": 1_342_177_280, "trained": 13_631_488, "ranks": [16]},
    {"part": "experts", "parameters": 45_097_156_608, "trained": 226_492_416, "ranks": [16]},
    {"part": "head", "parameters": 131_072_000, "trained": 0, "ranks": []},
]


def run_of(folder: Path, text: str, *overrides: str, doing: str = "training") -> Progress:
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return Progress(doing, recipe=recipe, config=MIXTRAL, parts=PARTS, base_bytes=93_000_000_000)


def torch_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    return caught.value


def numpy_error() -> MemoryError:
    with pytest.raises(MemoryError) as caught:
        np.zeros(2**55, dtype=np.uint8)
    return caught.value


def wrapped() -> RuntimeError:
    try:
        raise RuntimeError("row 3 could not be prepared") from torch_error()
    except RuntimeError as error:
        return error


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.01 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch_error(), "32,768.0 TiB more could not be had on the CPU"),
        (numpy_error(), "32.0 PiB more could not be had on the CPU"),
        (wrapped(), "32,768.0 TiB more"),
        (MemoryError(), "no more could be had"),
        (OSError(12, "Cannot allocate memory", "model.safetensors"), "no more could be had"),
        (torch.OutOfMemoryError(CUDA), "2.00 GiB more could not be had on the GPU"),
        (RuntimeError("CUDA error: out of memory"), "no more could be had"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "no more could"),
        (RuntimeError("can't start new thread"), "a thread could not be started, for want of memory or by the limit"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value[:12],
)
def test_every_form_of_the_error_is_recognised(error: Exception, asked: str) -> None:
    found = out_of_memory(error, "evaluate")
    assert found is not None
    assert f"finetune evaluate: out of memory: {asked}" in str(found)
    assert "; use a smaller --batch-size, or --dtype bfloat16" in str(found)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), OSError(2, "No such file", "a"), ValueError("out of memory")]
)
def test_another_error_stays_what_it_is(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert out_of_memory(error) is None


def test_the_largest_saving_comes_first(tmp_path: Path) -> None:
    found = savings(run_of(tmp_path, RECIPE), on_gpu=True)
    assert [saving.settings for saving in found] == [
        "training.gradient_checkpointing=full",
        "training.per_device_train_batch_size=1",
        "model.dtype=bfloat16",
        "data.max_length=2048 data.overlong=truncate",
        "model.load_in_4bit=true",
    ]
    found = savings(run_of(tmp_path, RECIPE, doing="loading the base"), on_gpu=True)
    assert [saving.settings for saving in found] == ["model.load_in_4bit=true", "model.dtype=bfloat16"]
    # The 4-bit base is known exactly: 46.4 billion weights at 4 bytes, and then at 0.52.
    assert next(saving.saved for saving in found if "4bit" in saving.settings) == pytest.approx(
        46.44e9 * 3.48, rel=0.01
    )


@pytest.mark.parametrize("text", [RECIPE, PAIRS], ids=["sft", "dpo"])
@pytest.mark.parametrize("doing", ["loading the base", "measuring experts", "training", "evaluating"])
def test_advice_can_be_followed_until_none_is_left(tmp_path: Path, text: str, doing: str) -> None:
    settings, advised = ["model.attn_implementation=eager"], set()
    for _ in range(40):
        found = savings(run_of(tmp_path, text, *settings, doing=doing), on_gpu=True)
        if not found:
            break
        given = {setting.partition("=")[0]: setting for setting in [*settings, *found[0].settings.split()]}
        assert sorted(given.values()) != sorted(settings), "this is already so"
        settings = list(given.values())
        advised |= {setting for saving in found for setting in saving.settings.split()}
    assert not found
    assert "model.load_in_4bit=true" in advised
    with_rows = doing != "loading the base"
    assert ("training.per_device_train_batch_size=1" in advised) == with_rows
    assert ("model.attn_implementation=sdpa" in advised) == with_rows
    assert ("method.prompt_sharing=auto" in advised) == (with_rows and text == PAIRS)
    assert ("training.gradient_checkpointing=full" in advised) == (doing == "training")


def test_a_run_says_what_is_known_and_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(run_of(tmp_path, RECIPE), step=7, run=tmp_path / "run", audit_table="part  stored as")
    for name, value in vars(run).items():
        monkeypatch.setattr(PROGRESS, name, value)
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    lines = str(out_of_memory(torch_error())).splitlines()
    assert lines[0].startswith("out of memory while training, step 7: 32,768.0 TiB more could not be had on the CPU; ")
    assert "got a peak of" in lines[0]
    assert lines[0].endswith("settings that need less, the largest saving first:")
    assert lines[1].startswith("    training.gradient_checkpointing=full  (about ")
    assert lines[-3] == f"saved: {tmp_path / 'run' / 'checkpoint-5'}"
    assert lines[-2:] == ["the model's own share:", "part  stored as"]


def test_the_lowest_limit_is_named() -> None:
    limit = memory_limit()[0]
    assert limit > 2**28
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))
        os._exit(0 if memory_limit() == (10**9, "ulimit -v") else 1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("name", ["merge", "evaluate", "check"])
def test_a_command_says_it_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_args: Any) -> int:
        raise torch_error()

    arguments = {"merge": ["a", "--output", "b"], "evaluate": ["a", "--data", "b"], "check": ["a"]}
    module = sys.modules[f"finetune.cli.{name}"]
    monkeypatch.setattr(module, "run", fails)
    assert command.main([name, *arguments[name]]) == RunError.exit_code
    line = capsys.readouterr().err
    assert line.startswith(f"finetune {name}: out of memory: 32,768.0 TiB more could not be had on the CPU; got a peak")
    assert line.count("\n") == 1
