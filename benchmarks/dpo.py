"""`make bench-dpo`: preference tuning beside SFT on this CPU, in fp32: steps, memory, loss head, shared prompts.

Prints the table of bars and writes a JSON file. Every ratio compares arms that took turns in one process. `--quick`
takes tiny shapes: it shows that the program runs, its figures mean nothing and are not compared with any bar.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch

from benchmarks.harness import Bar, interleaved, provenance, table, write_result
from benchmarks.loss_head import LOGITS, OURS, TRL, HeadShape, measure_heads
from benchmarks.loss_head import SHAPES as HEADS
from benchmarks.memory import transient_bytes
from benchmarks.pair_training import LIVE, PRECOMPUTED, SFT, PairShape, TrainingArm, Workplace, training_arm
from benchmarks.prompt_sharing import CASES, SharingCase, measure_sharing
from finetune.moe.checkpointing import enable_checkpointing
from finetune.recipe.settings import Recomputation

RESULT = Path("benchmarks/results/dpo-cpu.json")
REPEATS = 21
"""Rounds: a step of half a second meets busy neighbours whose effect is larger than the 5 % in question."""
FEW_REPEATS = 7
QUICK = PairShape(hidden=64, intermediate=64, experts=4, layers=1, vocabulary=512, pairs=2)
QUICK_HEADS = (HeadShape(32, 1100, 64, (LOGITS, TRL, OURS), timed=True),)
QUICK_CASES = (SharingCase(12, 4),)
SEED = 0
SFT_ARM, STORED, LIVE_ARM = "SFT", "DPO", "DPO live"
FROM_ADAPTER = " from an adapter"
MODES: tuple[Recomputation, ...] = ("none", "full")
TIME_BARS = {
    "none": {STORED: 1.05, STORED + FROM_ADAPTER: 1.05},
    "full": {STORED: 1.05, STORED + FROM_ADAPTER: 1.05, LIVE_ARM: 1.40, LIVE_ARM + FROM_ADAPTER: 1.40},
}
MEMORY_BAR = 1.10
METHODS: dict[str, dict[str, Any]] = {SFT_ARM: SFT, STORED: PRECOMPUTED, LIVE_ARM: LIVE}
Arms = dict[str, TrainingArm]


def build_arms(work: Workplace) -> Arms:
    """SFT, and DPO with either reference, from a fresh adapter and from a trained one, on the same tokens."""
    arms = {name: training_arm(work.recipe(method)) for name, method in METHODS.items()}
    for name, method in METHODS.items():
        arms[name + FROM_ADAPTER] = training_arm(work.recipe(method, from_adapter=True))
    check_same_tokens(arms)
    return arms


def check_same_tokens(arms: Mapping[str, TrainingArm]) -> None:
    """The race is fair where every arm's micro-batch has the same rows, and the same tokens are supervised."""
    batches = {name: arm.batch() for name, arm in arms.items()}
    rows = {name: sorted(batch["input_ids"].tolist()) for name, batch in batches.items()}
    supervised = {
        name: int(batch["labels"].ne(-100).sum() if "labels" in batch else batch["completion_mask"].sum())
        for name, batch in batches.items()
    }
    for name in arms:
        if rows[name] != rows[SFT_ARM] or supervised[name] != supervised[SFT_ARM]:
            raise SystemExit(f"bench: {name} and {SFT_ARM} do not train on the same tokens")


def sft_of(name: str) -> str:
    """SFT from the same adapter: another one routes otherwise, and the busiest expert makes the peak."""
    return SFT_ARM + FROM_ADAPTER if name.endswith(FROM_ADAPTER) else SFT_ARM


def against_sft(arms: Mapping[str, Any]) -> list[str]:
    """The arms of DPO."""
    return [name for name in arms if name != sft_of(name)]


def recompute(arms: Arms, mode: Recomputation) -> None:
    """Set `training.gradient_checkpointing` of every arm."""
    for arm in arms.values():
        enable_checkpointing(arm.trainer.model, mode)


def time_bars(arms: Arms, mode: str, at: str, repeats: int) -> tuple[list[Bar], dict[str, list[float]]]:
    """A step of DPO over one of SFT."""
    timings = interleaved({name: arm.step for name, arm in arms.items()}, repeats)
    limits = TIME_BARS[mode]
    bars = [
        Bar(f"{name} / SFT, time of a step", at, timings.ratio(name, sft_of(name)), "<=", limits.get(name), "time")
        for name in against_sft(arms)
    ]
    return bars, timings.seconds


def memory_bars(arms: Arms, at: str) -> tuple[list[Bar], dict[str, dict[str, int]]]:
    """The most that is held in a step over SFT's: the resident part and the additional part."""
    held = {}
    for name, arm in arms.items():
        arm.step()  # the optimizer has its state from the first step on
        gc.collect()  # what an earlier counted step left in a cycle would be taken off here
        held[name] = {"resident": arm.resident_bytes(), "transient": transient_bytes(arm.step)}
    bars = []
    for name in against_sft(arms):
        peak, transient = (
            sum(held[name][kind] for kind in kinds) / sum(held[sft_of(name)][kind] for kind in kinds)
            for kinds in (("resident", "transient"), ("transient",))
        )
        bars.append(Bar(f"{name} / SFT, peak of a step", at, peak, "<=", MEMORY_BAR, "memory"))
        bars.append(Bar(f"{name} / SFT, transient bytes of a step", at, transient, "<=", None, "memory"))
    return bars, held


def measure_steps(work: Workplace, repeats: int) -> tuple[list[Bar], dict[str, Any]]:
    """Time and memory of whole steps under both settings of recomputation."""
    bars: list[Bar] = []
    raw: dict[str, Any] = {"shape": vars(work.shape)}
    arms = build_arms(work)
    for mode in MODES:
        recompute(arms, mode)
        at = f"{work.shape.label}, {mode}"
        times, seconds = time_bars(arms, mode, at, repeats)
        memory, held = memory_bars(arms, at)
        bars += times + memory
        raw[mode] = {"seconds": seconds, "bytes": held, "places": arms[SFT_ARM].batch()["input_ids"].numel()}
        print(f"\n=== steps: {at}", flush=True)
        for name in arms:
            median = sorted(seconds[name])[len(seconds[name]) // 2]
            resident, transient = (held[name][kind] / 2**20 for kind in ("resident", "transient"))
            print(f"  {name:<28}{1e3 * median:>9.1f} ms{resident:>8.1f} MiB resident +{transient:>7.1f} MiB")
    return bars, raw


def measure_extras(work: Workplace, repeats: int) -> tuple[list[Bar], dict[str, Any]]:
    """What else a run pays for, without a bar: logged figures, the reference beforehand, and padding."""
    recipe = work.recipe(PRECOMPUTED)
    plain, logged = training_arm(recipe), training_arm(recipe, logs=True)
    packed = training_arm(work.recipe(PRECOMPUTED, packing=True))
    inputs = plain.trainer._prepare_inputs(plain.batch())
    arms = {
        "plain": plain.step,
        "logged": logged.step,
        "reference": lambda: plain.trainer.reference_logps(inputs),
        "packed": packed.step,
    }
    timings = interleaved(arms, repeats)
    places = {name: arm.batch()["input_ids"].numel() for name, arm in (("plain", plain), ("packed", packed))}
    ratios = {
        "a line logged in every step / none, step": ("logged", "plain"),
        "reference of a pair beforehand / a pair's training step": ("reference", "plain"),
        "padded pairs / packed ones, step": ("plain", "packed"),
    }
    at = f"{work.shape.label}, none"
    bars = [Bar(name, at, timings.ratio(*pair), "<=", None, "time") for name, pair in ratios.items()]
    bars.append(Bar("padded pairs / packed ones, places", at, places["plain"] / places["packed"], "<=", None, "count"))
    return bars, {"seconds": timings.seconds, "places": places}


def measure(args: argparse.Namespace) -> tuple[list[Bar], dict[str, Any]]:
    """All sections."""
    few = min(args.repeats, FEW_REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        work = Workplace.make(Path(folder), QUICK if args.quick else PairShape())
        bars, steps = measure_steps(work, args.repeats)
        found, extras = measure_extras(work, few)
        bars += found
    found, heads = measure_heads(few, QUICK_HEADS if args.quick else HEADS)
    bars += found
    found, sharing = measure_sharing(few, QUICK_CASES if args.quick else CASES)
    bars += found
    return bars, {"steps": steps, "extras": extras, "heads": heads, "sharing": sharing}


def main() -> None:
    """All sections; the table and the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to show that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor time is then the step's time, and a busy neighbour costs little
    datasets.disable_progress_bars()
    started = time.monotonic()
    measured_on = provenance(SEED)
    bars, raw = measure(args)
    if args.quick:
        bars = [replace(bar, limit=None) for bar in bars]
    print(f"\n{table(bars)}")
    write_result(
        args.output,
        {
            "what": "optimizer steps of the real trainers, fp32, processor time on one thread; ratios are medians",
            "quick": args.quick,
            "repeats": args.repeats,
            "bars": [bar.record() for bar in bars],
            **raw,
            "seconds": time.monotonic() - started,
            "provenance": measured_on | {"finished": provenance(SEED)["finished"]},
        },
    )


if __name__ == "__main__":
    main()
