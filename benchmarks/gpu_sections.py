"""The sections of `make bench-gpu`. Each returns its bars and leaves its raw figures in the run's record."""

import gc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import arms
from benchmarks.arms import DENSE, FROZEN, OURS, PEFT_EAGER, PEFT_GROUPED
from benchmarks.budget import Budget, NotMeasuredError
from benchmarks.decoder import DECODER_ARMS, DecoderArm, build_decoder, prepared
from benchmarks.gpu_run import GIB, Run
from benchmarks.gpu_whole import loading_section, whole_section
from benchmarks.harness import REPEATS, Timings, interleaved, provenance, table, wall_clock, write_result
from benchmarks.plan import Plan
from benchmarks.recompute import MODES
from benchmarks.shapes import SKEW, draw_routing
from finetune.moe.audit import storage_of
from finetune.moe.checkpointing import enable_checkpointing
from finetune.recipe.settings import Recomputation

AGREEMENT = 0.05  # bf16: largest difference of outputs and gradients over the largest value


def run_all(plan: Plan, seconds: float, output: Path, dry_run: bool) -> list[str]:
    """Every section; the result file is written after each. Returns the names of those that failed."""
    run = Run(plan, Budget(seconds))
    measured_on = provenance(0)
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        measured_on["hardware"] |= {
            "gpu_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
        }
    for name, section in SECTIONS.items():
        run.budget.section(name, partial(section, run))
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
        if dry_run:
            run.bars = [replace(bar, limit=None) for bar in run.bars]
        write_result(
            output,
            {
                "what": "Mixtral-8x7B's shapes, bf16, random NF4 weights; wall time; ratios: medians over rounds",
                "dry_run": dry_run,
                "plan": vars(plan),
                "routing": {"popularity": "rank ** -skew, drawn without replacement", "skew": SKEW},
                "bars": [bar.record() for bar in run.bars],
                "skipped": run.budget.skipped,
                "failed": run.budget.failed,
                "section_seconds": run.budget.took,
                **run.raw,
                "provenance": measured_on | {"finished": provenance(0)["finished"]},
            },
        )
    print(f"\n{table(run.bars)}")
    for name, reason in run.budget.skipped.items():
        print(f"not measured: {name}: {reason}")
    return list(run.budget.failed)


def matmul_section(run: Run) -> None:
    """The matrix product that useful FLOPs are measured against, on random values."""
    n = run.plan.matmul
    a, b = (torch.randn(n, n, device=run.plan.device).to(torch.bfloat16) for _ in range(2))
    timings = interleaved({"matmul": lambda: a @ b}, 3 * REPEATS, wall_clock, at_least=0.05)
    run.raw["matmul_flops"] = 2 * n**3 / timings.median("matmul")
    print(f"  {n}^3 bf16 matmul: {run.raw['matmul_flops'] / 1e12:.0f} TFLOP/s")


def experts_section(run: Run) -> None:
    """One layer's experts alone: do the arms agree, and how often do they wait for the GPU."""
    shape = run.shape
    inputs = arms.make_inputs(shape, draw_routing(shape), torch.bfloat16, run.plan.device)
    raw: dict[str, Any] = {"skew": inputs.routing.skew, "syncs": {}}
    run.raw["experts"] = raw
    peft = arms.build(PEFT_GROUPED, shape, inputs)
    for name in (DENSE, OURS, PEFT_EAGER):
        arm = arms.build(name, shape, inputs)
        if name == DENSE:
            raw["disagreement"] = arms.disagreement(arm, peft)
        raw["syncs"][name] = host_syncs(arm.step, run.plan.device)
        del arm
    raw["syncs"][PEFT_GROUPED] = host_syncs(peft.step, run.plan.device)
    if not raw["disagreement"] < AGREEMENT:
        raise ValueError(f"{DENSE} and {PEFT_GROUPED} differ by {raw['disagreement']:.1e}: not the same work")
    if raw["syncs"][OURS] is None:
        raise NotMeasuredError("host syncs are counted on a CUDA device only")
    limit = 0 if torch.cuda.get_device_capability() >= (9, 0) else 1
    run.bar("host syncs a MoE layer, forward + backward", shape.label, raw["syncs"][OURS], "<=", limit, "count")


def host_syncs(step: Callable[[], object], device: str) -> int | None:
    """How often one step makes the host wait for the device; None without one. The step has run before."""
    step()
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def decoder_section(run: Run) -> None:
    """Decoder layers of all arms: same layers, same tokens, same routing, same recomputation."""
    plan = run.plan
    built = {name: build_decoder(name, run.shape, plan.layers, plan.device) for name in DECODER_ARMS}
    raw: dict[str, Any] = {"layers": plan.layers, "steps": []}
    run.raw["decoder"] = raw
    resident_bar(run, built[OURS])
    modes: tuple[Recomputation, ...] = ("none", "full")  # what people use has no selective
    for tokens in plan.tokens:
        for mode in modes:
            with prepared(built, tokens, plan.sequence, mode):
                raw["steps"].append(measure_decoders(run, built, tokens, mode))
        with prepared({OURS: built[OURS]}, tokens, plan.sequence, "none"):
            raw["steps"].append(measure_recomputation(run, built[OURS], tokens))


def resident_bar(run: Run, arm: DecoderArm) -> None:
    """Bytes that the experts' stacks hold, over those of the same values in bf16."""
    stacks = [value for name, value in arm.model.named_parameters() if value.ndim == 3 and ".lora_" not in name]
    stored = sum(storage_of(stack)[2] for stack in stacks)
    run.bar(
        "resident bytes / bf16 bytes",
        f"{run.plan.layers} layers' experts",
        stored / sum(2 * stack.numel() for stack in stacks),
        "<=",
        0.27,
        "memory",
    )


def measure_decoders(run: Run, group: dict[str, DecoderArm], tokens: int, mode: Recomputation) -> dict[str, Any]:
    """Times and transient bytes of one group of arms, and the bars on them."""
    steps = {name: arm.step for name, arm in group.items()}
    timings = interleaved(steps, run.budget.rounds(REPEATS), wall_clock, at_least=0.0)
    transient = {}
    for name, arm in group.items():
        arm.model.zero_grad(set_to_none=True)
        transient[name] = run.transient(arm.step)
    record = {"tokens": tokens, "recompute": mode, "arms": arm_records(timings, transient)}
    at = f"{run.plan.layers} layers, {tokens} tokens, {mode}"
    few = tokens == run.plan.tokens[0]
    run.bar(f"{PEFT_GROUPED} / ours, time", at, timings.ratio(PEFT_GROUPED, OURS), ">=", 1.5 if few else 1.3)
    run.bar(f"{PEFT_EAGER} / ours, time", at, timings.ratio(PEFT_EAGER, OURS), ">=", 2.0)
    run.bar(f"ours / {FROZEN}, time", at, timings.ratio(OURS, FROZEN), "<=", 1.08)
    run.bar("ours / ours unquantised, time", at, timings.ratio(OURS, DENSE), "<=", 1.25 if few else 1.08)
    share = transient[OURS] / transient[PEFT_GROUPED]
    run.bar(f"ours / {PEFT_GROUPED}, transient bytes", at, share, "<=", 0.35, "memory")
    return record


def measure_recomputation(run: Run, arm: DecoderArm, tokens: int) -> dict[str, Any]:
    """Our arm under each setting of recomputation, in turns."""

    def step(mode: Recomputation) -> None:
        enable_checkpointing(arm.model, mode)
        arm.step()

    steps: dict[str, Callable[[], object]] = {mode: partial(step, mode) for mode in MODES}
    timings = interleaved(steps, run.budget.rounds(REPEATS), wall_clock, at_least=0.0)
    transient: dict[str, int] = {}
    for mode in MODES:
        arm.model.zero_grad(set_to_none=True)
        transient[mode] = run.transient(steps[mode])
    at = f"{run.plan.layers} layers, {tokens} tokens"
    run.bar("selective / full recomputation, time", at, timings.ratio("selective", "full"), "<=", 0.72)
    run.bar("none / full recomputation, time", at, timings.ratio("none", "full"), "<=", None)
    for mode in ("selective", "full"):
        run.bar(f"{mode} / none, transient bytes", at, transient[mode] / transient["none"], "<=", None, "memory")
    return {"tokens": tokens, "recompute": "in turns", "arms": arm_records(timings, transient)}


def arm_records(timings: Timings, transient: Mapping[str, int]) -> dict[str, Any]:
    """Raw figures, shown at once."""
    for name in transient:
        print(f"  {name:<28}{1e3 * timings.median(name):>9.1f} ms{transient[name] / GIB:>8.2f} GiB")
    return {
        name: {
            "median_ms": 1e3 * timings.median(name),
            "ms": [1e3 * value for value in timings.seconds[name]],
            "transient_bytes": transient[name],
        }
        for name in transient
    }


SECTIONS: dict[str, Callable[[Run], None]] = {
    "matmul": matmul_section,
    "experts of one layer": experts_section,
    "decoder layers": decoder_section,
    "whole model": whole_section,
    "loading": loading_section,
}
