"""The sections of `make bench-gpu` that take whole models: training steps, and loading."""

import gc
import shutil
import statistics
import tempfile
import time
from functools import partial
from importlib import metadata
from typing import Any

import torch
from packaging.version import Version

from benchmarks.budget import NotMeasuredError
from benchmarks.decoder import draw_routers, route
from benchmarks.gpu_run import GIB, Run
from benchmarks.harness import interleaved, wall_clock
from benchmarks.loading import measure_loading, stack_bytes
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.plan import Plan
from benchmarks.recompute import MODES
from finetune.moe.checkpointing import enable_checkpointing
from finetune.recipe.settings import Recomputation

MODEL_LAYERS = 32  # of Mixtral-8x7B
MODEL_FLOPS = 55.2e9  # a token, forward and backward with LoRA on attention and experts, without recomputation
HEAD_FLOPS = 4 * 4096 * 32000
LEAST_WHOLE = 3  # rounds of the whole model: its tokens/s are no ratio
LOADER_NEEDS = Version("5.23")  # of transformers; the rest of the benchmark runs on 5.17, too


def loading_section(run: Run) -> None:
    """Load a checkpoint of some layers in 4 bits: what stays, and the peak on the way."""
    plan = run.plan
    if Version(metadata.version("transformers")) < LOADER_NEEDS:
        raise NotMeasuredError(
            f"the loader needs transformers {LOADER_NEEDS}; this is {metadata.version('transformers')}"
        )
    folder_bytes = 2 * plan.loaded * stack_bytes(run.shape)  # with room to spare
    if shutil.disk_usage(tempfile.gettempdir()).free < folder_bytes:
        raise NotMeasuredError(f"{folder_bytes / GIB:.0f} GiB of disk are needed in {tempfile.gettempdir()}")
    loading = measure_loading(run.shape, plan.loaded, plan.device)
    run.raw["loading"] = vars(loading)
    for bar in loading.bars:
        run.bar(bar.ratio, bar.at, bar.measured, bar.sign, bar.limit, bar.kind)


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
    """Useful FLOPs of a token; the figure of the whole model for 32 layers, its share for fewer."""
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
