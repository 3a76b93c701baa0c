"""The sections of `make bench-gpu`. Each returns its bars and leaves its raw figures in the run's record."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import arms
from benchmarks.arms import DENSE, FROZEN, OURS, PEFT_EAGER, PEFT_GROUPED
from benchmarks.budget import Budget, NotMeasuredError
from benchmarks.decoder import DECODER_ARMS, DecoderArm, build_decoder, draw_routers, prepared, route
from benchmarks.harness import REPEATS, Bar, interleaved, provenance, table, wall_clock, write_result
from benchmarks.memory import cuda_transient_bytes, transient_bytes
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.plan import Plan
from benchmarks.recompute import MODES
from benchmarks.shapes import SKEW, Shape, draw_routing
from finetune.moe.audit import storage_of
from finetune.moe.checkpointing import Recomputation, enable_checkpointing

MODEL_LAYERS = 32  # of Mixtral-8x7B
MODEL_FLOPS = 55.2e9  # a token, forward and backward with LoRA on attention and experts, without recomputation
HEAD_FLOPS = 4 * 4096 * 32000
AGREEMENT = 0.05  # bf16: largest difference of outputs and gradients over the largest value
LEAST_WHOLE = 3  # rounds of the whole model: its tokens/s are no ratio
GIB = 2**30


@dataclass
class Run:
    """What is measured, for how long, and what has been found so far."""

    plan: Plan
    budget: Budget
    bars: list[Bar] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """The experts' shape at the first number of tokens."""
        return self.plan.shape(self.plan.tokens[0])

    def transient(self, step: Callable[[], object]) -> int:
        """Most bytes held by a step beyond those before it."""
        return cuda_transient_bytes(step) if self.plan.device == "cuda" else transient_bytes(step)

    def bar(self, ratio: str, at: str, measured: float, sign: Any, limit: float | None, kind: Any = "time") -> None:
        """Note one line of the table, and show it at once."""
        self.bars.append(Bar(ratio, at, measured, sign, limit, kind))
        print(f"  {ratio} [{at}]: {measured:.3f}", flush=True)


def run_all(plan: Plan, seconds: float, output: Path, dry_run: bool) -> list[str]:
    """Every section; the result file is written after each. Returns the names of those that failed."""
    run = Run(plan, Budget(seconds))
    told = provenance(0)
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        told["hardware"] |= {
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
                "provenance": told | {"finished": provenance(0)["finished"]},
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
    """One layer's experts alone: do the arms agree, how often do they wait for the GPU, what do they hold."""
    shape = run.shape
    inputs = arms.make_inputs(shape, draw_routing(shape), torch.bfloat16, run.plan.device)
    raw: dict[str, Any] = {"skew": inputs.routing.skew, "syncs": {}, "transient_bytes": {}}
    run.raw["experts"] = raw
    peft = arms.build(PEFT_GROUPED, shape, inputs)
    for name in (DENSE, OURS, PEFT_EAGER):
        arm = arms.build(name, shape, inputs)
        if name == DENSE:
            raw["disagreement"] = arms.disagreement(arm, peft)
            if not raw["disagreement"] < AGREEMENT:
                raise ValueError(
                    f"{DENSE} and {PEFT_GROUPED} differ by {raw['disagreement']:.1e}: the race is not fair"
                )
        raw["syncs"][name] = host_syncs(arm.step, run.plan.device)
        del arm
    raw["syncs"][PEFT_GROUPED] = host_syncs(peft.step, run.plan.device)
    hopper = run.plan.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    if raw["syncs"][OURS] is None:
        raise NotMeasuredError("host syncs are counted on a CUDA device only")
    run.bar(
        "host syncs a MoE layer, forward + backward", shape.label, raw["syncs"][OURS], "<=", 0 if hopper else 1, "count"
    )


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
    for tokens in plan.tokens:
        for mode in MODES:
            # "Selective" is ours alone; what people use has none and full.
            names = DECODER_ARMS if mode != "selective" else (OURS,)
            group = {name: built[name] for name in names}
            with prepared(group, tokens, plan.sequence, mode):
                record = measure_decoders(run, group, tokens, mode)
            raw["steps"].append(record)
    recompute_bars(run, raw["steps"])


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
    record = {
        "tokens": tokens,
        "recompute": mode,
        "arms": {
            name: {
                "median_ms": 1e3 * timings.median(name),
                "ms": [1e3 * value for value in timings.seconds[name]],
                "transient_bytes": transient[name],
            }
            for name in group
        },
    }
    for name in group:
        print(f"  {name:<28}{1e3 * timings.median(name):>9.1f} ms{transient[name] / GIB:>8.2f} GiB")
    if len(group) == 1:
        return record
    at = f"{run.plan.layers} layers, {tokens} tokens, {mode}"
    few = tokens == run.plan.tokens[0]
    run.bar(f"{PEFT_GROUPED} / ours, time", at, timings.ratio(PEFT_GROUPED, OURS), ">=", 1.5 if few else 1.3)
    run.bar(f"{PEFT_EAGER} / ours, time", at, timings.ratio(PEFT_EAGER, OURS), ">=", 2.0)
    run.bar(f"ours / {FROZEN}, time", at, timings.ratio(OURS, FROZEN), "<=", 1.08)
    run.bar("ours / ours unquantised, time", at, timings.ratio(OURS, DENSE), "<=", 1.25 if few else 1.08)
    share = transient[OURS] / transient[PEFT_GROUPED]
    run.bar(f"ours / {PEFT_GROUPED}, transient bytes", at, share, "<=", 0.35, "memory")
    return record


def recompute_bars(run: Run, steps: list[dict[str, Any]]) -> None:
    """Selective over full, from the medians of our arm at the same number of tokens."""
    found = {(step["tokens"], step["recompute"]): step["arms"][OURS] for step in steps}
    for tokens in run.plan.tokens:
        at = f"{run.plan.layers} layers, {tokens} tokens"
        for mode, limit in (("selective", 0.72), ("none", None)):
            if (tokens, mode) not in found:
                continue
            mine, full = found[tokens, mode], found[tokens, "full"]
            run.bar(f"{mode} / full recomputation, time", at, mine["median_ms"] / full["median_ms"], "<=", limit)


def whole_section(run: Run) -> None:
    """The whole model with head and loss: tokens/s, peak memory, useful FLOPs under each setting of recomputation."""
    plan = run.plan
    layers = whole_layers(plan)
    config = mixtral_config(run.shape, layers, plan.vocabulary)
    started = time.monotonic()
    model = random_mixtral(config, torch.bfloat16, plan.device)
    draw_routers(model)
    adapted = adapt_mixtral(model, plan.rank)
    raw: dict[str, Any] = {"layers": layers, "built_seconds": time.monotonic() - started, "steps": []}
    run.raw["whole"] = raw
    if plan.device == "cuda":
        raw["resident_bytes"] = torch.cuda.memory_allocated()
        print(f"  {layers} layers with LoRA: {raw['resident_bytes'] / GIB:.1f} GiB resident")
    for tokens in plan.tokens:
        for mode in MODES:
            measure = partial(measure_whole, run, adapted, tokens, mode)
            run.budget.section(f"whole model, {tokens} tokens, {mode}", measure)
            adapted.zero_grad(set_to_none=True)
            gc.collect()
    best = {
        tokens: max((step["tokens_per_second"] for step in raw["steps"] if step["tokens"] == tokens), default=None)
        for tokens in plan.tokens
    }
    for tokens, limit in zip(plan.tokens, (0.50, 0.60), strict=True):
        speed = best[tokens]
        if speed is not None and "matmul_flops" in run.raw:
            share = flops_per_token(layers) * speed / run.raw["matmul_flops"]
            run.bar("useful FLOPs / matmul", f"{layers} layers, {tokens} tokens, best", share, ">=", limit)


def whole_layers(plan: Plan) -> int:
    """All layers where the memory allows: weights, LoRA with gradients, and room for a step with recomputation."""
    if plan.device != "cuda":
        return plan.whole[0]
    return plan.whole[0] if torch.cuda.mem_get_info()[0] > 60 * GIB else plan.whole[-1]


def flops_per_token(layers: int) -> float:
    """Useful FLOPs of a token; the issue's figure for 32 layers, its share for fewer."""
    return HEAD_FLOPS + (MODEL_FLOPS - HEAD_FLOPS) * layers / MODEL_LAYERS


def measure_whole(run: Run, model: Any, tokens: int, mode: Recomputation) -> None:
    """Seconds and peak of a training step (forward, loss, backward) of the whole model."""
    plan = run.plan
    skew = route(model, run.shape, tokens)
    enable_checkpointing(model, mode)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, plan.vocabulary, (tokens // plan.sequence, plan.sequence), generator=generator)
    ids = ids.to(plan.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    if plan.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timings = interleaved({mode: step}, run.budget.rounds(LEAST_WHOLE), wall_clock, at_least=0.0)
    seconds = statistics.median(timings.seconds[mode])
    peak = torch.cuda.max_memory_allocated() if plan.device == "cuda" else None
    shown = "" if peak is None else f", peak {peak / GIB:.1f} GiB"
    print(f"  {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s a step{shown}", flush=True)
    run.raw["whole"]["steps"].append(
        {
            "tokens": tokens,
            "recompute": mode,
            "skew": skew,
            "seconds": timings.seconds[mode],
            "tokens_per_second": tokens / seconds,
            "peak_bytes": peak,
        }
    )


SECTIONS: dict[str, Callable[[Run], None]] = {
    "matmul": matmul_section,
    "experts of one layer": experts_section,
    "decoder layers": decoder_section,
    "whole model": whole_section,
}
