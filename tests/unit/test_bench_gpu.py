"""`make bench-gpu` as a dry run on the CPU, and the clock that keeps it inside its time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.budget import Budget, NotMeasuredError
from benchmarks.decoder import build_decoder, prepared
from benchmarks.gpu_whole import flops_per_token
from benchmarks.harness import REPEATS, interleaved
from benchmarks.mixtral import mixtral_config, random_mixtral
from benchmarks.plan import DRY, H200
from finetune.moe.audit import storage_of

# A GPU machine's Python may have none of these.
DRY_RUN = """
import sys
sys.modules.update(dict.fromkeys(("trl", "datasets", "wandb", "trackio")))
from benchmarks import gpu
sys.argv = ["gpu", "--dry-run", "--output", sys.argv[1]]
gpu.main()
"""


def test_the_dry_run_takes_every_section_without_trl_and_tells_what_it_left_out(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = subprocess.run([sys.executable, "-c", DRY_RUN, str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["failed"] == {}
    assert result["skipped"] == {"experts of one layer": "host syncs are counted on a CUDA device only"}
    assert result["experts"]["disagreement"] < 0.05
    assert [step["recompute"] for step in result["decoder"]["steps"]].count("full") == len(DRY.tokens)
    assert {step["tokens"] for step in result["whole"]["steps"]} == set(DRY.tokens)
    assert "not measured: experts of one layer: host syncs are counted on a CUDA device only" in done.stdout
    assert "useful FLOPs / matmul" in done.stdout


def test_no_time_left_is_told_for_every_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu", "--dry-run", "--seconds", "0", "--output", str(output)])
    gpu.main()
    assert set(json.loads(output.read_text())["skipped"].values()) == {"no time left"}
    assert capsys.readouterr().out.count("not measured: ") == len(json.loads(output.read_text())["skipped"])


def test_a_late_run_takes_fewer_rounds_but_never_fewer_than_a_ratio_needs() -> None:
    budget = Budget(seconds=100, started=time.monotonic())
    assert budget.rounds(least=3)(1.0) == REPEATS
    assert budget.rounds(least=3)(20.0) == 4
    with pytest.raises(NotMeasuredError, match=r"7 rounds take 140 s; \d+ s were left"):
        budget.rounds(least=REPEATS)(20.0)
    timings = interleaved({"step": lambda: time.sleep(0.001)}, lambda seconds: 2 if seconds > 0 else 0)
    assert len(timings.seconds["step"]) == 2


def test_a_section_that_fails_is_kept_with_its_traceback_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    budget = Budget(seconds=100)

    def broken() -> None:
        raise ValueError("no such kernel")

    def full() -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nmore")

    budget.section("broken", broken)
    budget.section("full", full)
    budget.section("next", lambda: None)
    assert "no such kernel" in budget.failed["broken"]
    assert budget.skipped == {"full": "out of memory: tried to allocate 2 GiB"}
    assert budget.took.keys() == {"broken", "full", "next"}
    assert "FAILED: ValueError: no such kernel" in capsys.readouterr().out


def test_a_python_that_lacks_a_package_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"lacks no_such_package; install them there.*BENCH_PYTHON"):
        gpu.check_machine(dry_run=True)


def test_without_a_gpu_the_real_run_is_refused_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="no CUDA device; --dry-run shows"):
        gpu.check_machine(dry_run=False)


def test_random_models_are_4_bit_without_a_16_bit_copy_and_decoder_arms_route_alike() -> None:
    config = mixtral_config(DRY.shape(32), layers=1, vocabulary=64)
    model = random_mixtral(config, torch.bfloat16, "cpu")
    formats = {name.rpartition("layers.0.")[2]: storage_of(value)[0] for name, value in model.named_parameters()}
    assert formats["self_attn.q_proj.weight"] == formats["mlp.experts.gate_up_proj"] == "nf4"
    assert formats["mlp.gate.weight"] == formats["input_layernorm.weight"] == "bfloat16"
    dense = model.model.layers[0].mlp.experts.gate_up_proj.data.dequantize().float()
    assert 0.01 < dense.std() < 0.05

    two = {name: build_decoder(name, DRY.shape(32), 1, "cpu") for name in ("ours unquantised", "PEFT grouped_mm")}
    with prepared(two, 32, 16, "full"):
        for arm in two.values():
            arm.step()
        one, other = (arm.model for arm in two.values())
        for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
            if mine.requires_grad:
                assert mine.grad is not None, name
                torch.testing.assert_close(mine.grad, theirs.grad, atol=0.05 * float(theirs.grad.abs().max()), rtol=0.1)
    assert all(arm.input_BSH is None for arm in two.values())


def test_useful_flops_are_the_active_weights_twice_forward_and_twice_backward() -> None:
    """32 layers: 4 FLOPs for each of 12.75 G active weights, and what attention scores and LoRA add (8 %)."""
    attention, expert, head = 41.9e6, 3 * 4096 * 14336, 4096 * 32000
    active = 32 * (attention + 2 * expert) + head
    assert 1.0 < flops_per_token(32) / (4 * active) < 1.1
    assert flops_per_token(4) < flops_per_token(32) / 6
    assert H200.shape(4096).label == "H4096 I14336 E8 k2 T4096 r16"
