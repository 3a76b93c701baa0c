"""`make bench`: the experts' forward and backward on this CPU, in fp32, beside what people use.

Prints the table of bars and writes a JSON file. Every ratio compares arms that took turns in one process. `--quick`
takes one tiny shape: it shows that the program runs, its figures mean nothing and are not compared with any bar.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import arms
from benchmarks.arms import Arm
from benchmarks.harness import REPEATS, Bar, Timings, interleaved, provenance, table, write_result
from benchmarks.loading import measure_loading
from benchmarks.memory import transient_bytes
from benchmarks.recompute import measure_recompute
from benchmarks.shapes import CPU_SHAPES, QUARTER_OLMOE, SKEW, Shape, draw_routing
from finetune.moe.nf4 import Nf4Stack

RESULT = Path("benchmarks/results/experts-cpu.json")
QUICK_SHAPES = (Shape(64, 96, 4, 2, 64, 4),)
AGREEMENT = 1e-4  # largest difference between arms that hold the same values, over the largest value
SEED = 0


def build_arms(shape: Shape, names: Sequence[str] = arms.ARMS) -> dict[str, Arm]:
    """Arms at one shape; refuses to go on where those on equal weights do not compute the same."""
    inputs = arms.make_inputs(shape, draw_routing(shape, SEED), torch.float32)
    built = {name: arms.build(name, shape, inputs) for name in names}
    for name in {arms.DENSE, arms.PEFT_EAGER} & built.keys() if arms.PEFT_GROUPED in built else ():
        difference = arms.disagreement(built[name], built[arms.PEFT_GROUPED])
        if not difference < AGREEMENT:
            raise SystemExit(f"bench: {name} and {arms.PEFT_GROUPED} differ by {difference:.1e} at {shape.label}")
    return built


def resident_ratio(arm: Arm) -> float:
    """Bytes that the arm's stacks hold, over those of the same values in bf16."""
    stacks = [value.data for value in arm.model.parameters() if isinstance(value.data, Nf4Stack)]
    return sum(stack.stored_bytes for stack in stacks) / sum(2 * stack.numel() for stack in stacks)


def time_bars(shape: Shape, timings: Timings) -> Iterator[Bar]:
    """The ratios of step times at one shape. Some have no bar and are reported for information."""
    grouped = 1.7 if shape.rows <= 128 else 1.4 if shape.rows >= 512 else None
    ratios: tuple[tuple[str, str, Any, float | None], ...] = (
        (arms.PEFT_GROUPED, arms.OURS, ">=", grouped),
        (arms.PEFT_EAGER, arms.OURS, ">=", 8.0 if shape.experts >= 64 else 2.0),
        (arms.OURS, arms.FROZEN, "<=", 1.15),
        (arms.OURS, arms.DENSE, "<=", 1.25 if shape.rows == 256 else None),
        (arms.PEFT_GROUPED, arms.DENSE, ">=", None),
        (arms.PEFT_EAGER, arms.DENSE, ">=", None),
        (arms.OURS, arms.FROZEN_STOCK, "<=", None),
    )
    for over, under, sign, limit in ratios:
        if {over, under} <= timings.seconds.keys():
            ratio = timings.ratio(over, under)
            yield Bar(f"{over} / {under}, time", shape.label, ratio, sign, limit, "time")


def memory_bars(shape: Shape, built: dict[str, Arm], transient: dict[str, int]) -> Iterator[Bar]:
    """Resident size, and what a step holds beyond weights, LoRA and inputs (its gradients count)."""
    yield Bar("resident bytes / bf16 bytes", shape.label, resident_ratio(built[arms.OURS]), "<=", 0.27, "memory")
    for name, limit in ((arms.PEFT_GROUPED, 0.35), (arms.PEFT_EAGER, None)):
        if name in transient:
            ratio = transient[arms.OURS] / transient[name]
            yield Bar(f"{arms.OURS} / {name}, transient bytes of a step", shape.label, ratio, "<=", limit, "memory")


def transients(built: dict[str, Arm]) -> dict[str, int]:
    """Most bytes that one step of each arm holds beyond those before it; its old gradients are released first."""
    found = {}
    for name, arm in built.items():
        arm.step()  # warm
        for tensor in (arm.inputs.x_TH, arm.inputs.weight_TK, *arm.lora.values()):
            tensor.grad = None
        found[name] = transient_bytes(arm.step)
    return found


def measure_shape(shape: Shape, repeats: int) -> tuple[list[Bar], dict[str, Any]]:
    """Bars and raw figures of one shape."""
    built = build_arms(shape)
    timings = interleaved({name: arm.step for name, arm in built.items()}, repeats)
    transient = transients(built)
    raw = {
        "shape": vars(shape) | {"rows_an_expert": shape.rows, "skew": built[arms.OURS].inputs.routing.skew},
        "arms": {
            name: {
                "median_ms": 1e3 * timings.median(name),
                "ms": [1e3 * value for value in timings.seconds[name]],
                "transient_bytes": transient[name],
            }
            for name in built
        },
    }
    return [*time_bars(shape, timings), *memory_bars(shape, built, transient)], raw


def show(raw: dict[str, Any]) -> None:
    """Milliseconds and mebibytes of every arm at one shape."""
    shape = raw["shape"]
    print(f"\n{shape['rows_an_expert']} rows an expert; busiest expert / mean {shape['skew']:.2f}")
    for name, arm in raw["arms"].items():
        print(f"  {name:<36}{arm['median_ms']:>9.1f} ms{arm['transient_bytes'] / 2**20:>9.1f} MiB")


def main() -> None:
    """All shapes, then checkpointing; the table and the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, to show that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor time is then the step's time, and a busy neighbour costs little
    started = time.monotonic()
    measured_on = provenance(SEED)
    bars: list[Bar] = []
    shapes = []
    for shape in QUICK_SHAPES if args.quick else (*CPU_SHAPES, QUARTER_OLMOE):
        print(f"\n=== {shape.label}", flush=True)
        found, raw = measure_shape(shape, args.repeats)
        show(raw)
        bars += found
        shapes.append(raw)
    small = (QUICK_SHAPES[0], 2) if args.quick else ()
    found, recompute = measure_recompute(args.repeats, *small)
    bars += found
    if args.quick:
        bars = [replace(bar, limit=None) for bar in bars]
    elif Path("/proc/self/status").exists():
        bars += measure_loading().bars
    print(f"\n{table(bars)}")
    write_result(
        args.output,
        {
            "what": "experts module forward + backward, fp32, processor time on one thread; ratios are medians",
            "quick": args.quick,
            "repeats": args.repeats,
            "routing": {"popularity": "rank ** -skew, drawn without replacement", "skew": SKEW, "seed": SEED},
            "bars": [bar.record() for bar in bars],
            "shapes": shapes,
            "recompute": recompute,
            "seconds": time.monotonic() - started,
            "provenance": measured_on | {"finished": provenance(SEED)["finished"]},
        },
    )


if __name__ == "__main__":
    main()
