"""Merging on a generated checkpoint, beside a plain copy of its file and beside PEFT's `merge_and_unload`.

    python -m benchmarks.merge [--layers 1] [--rounds 5] [--folder FOLDER]

One decoder layer of Mixtral-8x7B's shapes with its embeddings (3.4 GB in bfloat16), random weights, an adapter of rank
16 on attention and all experts. Each arm is a process of its own, and they take turns. Needs three times the
checkpoint's size of disk, and the memory that `merge_and_unload` takes (no more than twice the checkpoint).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar, provenance, table, write_result
from benchmarks.merge_checkpoint import RANK, generate, largest_tensor

RESULT = Path(__file__).parent / "results" / "merge-cpu.json"
ARITHMETIC = 1.2e9  # bytes a second and thread: a bfloat16 product of rank 16 added to the weight
MAX_TIME, MAX_LARGEST, MAX_OF_PEFT = 1.3, 3.0, 0.10


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made (default: a temporary folder)")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measured = measure(Path(folder), args.layers, args.rounds)
    bars = bars_of(measured)
    print(table(bars))
    write_result(
        args.result,
        {"measured": measured, "bars": [bar.record() for bar in bars], "provenance": provenance(0)},
    )
    return 0


def measure(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of every arm; `folder` holds the checkpoints meanwhile."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    generate(base, adapter, layers)
    weights = base / "model.safetensors"
    print(f"checkpoint: {weights.stat().st_size / 1e9:.2f} GB, rank {RANK}", flush=True)
    copies, synced, merges, peaks = [], [], [], []
    for number in range(rounds):
        seconds = copied(weights, folder / "copy")
        copies.append(seconds[0])
        synced.append(sum(seconds))
        merged = arm("merge", base, adapter, out)
        merges.append(merged["stream_seconds"])
        peaks.append(merged["peak"])
        print(f"round {number + 1}: copy {seconds[0]:.2f} s, merge {merges[-1]:.2f} s", flush=True)
    proven, stock = arm("merge-and-prove", base, adapter, out), arm("peft", base, adapter, out)
    return {
        "checkpoint_bytes": weights.stat().st_size,
        "largest_tensor_bytes": largest_tensor(base),
        "threads": len(os.sched_getaffinity(0)),
        "copy_seconds": copies,
        "copy_and_sync_seconds": synced,
        "merge_seconds": merges,
        "merge_peak_bytes": peaks,
        "proven": proven,
        "merge_and_unload": stock,
    }


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of a plain copy, and of having the disk take it."""
    started = time.perf_counter()
    shutil.copyfile(source, target)
    done = time.perf_counter()
    with target.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter()
    target.unlink()
    return done - started, synced - done


def arm(name: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """One arm in a process of its own; what it measured of itself. Its output is removed."""
    words = [sys.executable, "-m", "benchmarks.merge_arms", name, str(base), str(adapter), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    shutil.rmtree(out)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def bars_of(measured: dict[str, Any]) -> list[Bar]:
    """The bars; times as the median over the rounds of ratios within one."""
    arithmetic = measured["checkpoint_bytes"] / (ARITHMETIC * measured["threads"])
    at = f"{measured['checkpoint_bytes'] / 1e9:.1f} GB, {measured['threads']} threads"
    over = [
        merge / max(copy, arithmetic)
        for merge, copy in zip(measured["merge_seconds"], measured["copy_seconds"], strict=True)
    ]
    durable = [
        merge / max(copy, arithmetic)
        for merge, copy in zip(measured["merge_seconds"], measured["copy_and_sync_seconds"], strict=True)
    ]
    peak = max(measured["merge_peak_bytes"])
    stock, proven = measured["merge_and_unload"], measured["proven"]
    merging = statistics.median(measured["merge_seconds"])
    return [
        Bar("merge / larger of copy and arithmetic", at, statistics.median(over), "<=", MAX_TIME, "time"),
        Bar("merge / the same with the copy on disk", at, statistics.median(durable), "<=", None, "time"),
        Bar("peak / largest tensor", at, peak / measured["largest_tensor_bytes"], "<=", MAX_LARGEST, "memory"),
        Bar("peak / merge_and_unload's", at, peak / stock["peak"], "<=", MAX_OF_PEFT, "memory"),
        Bar("peak with the proof / merge_and_unload's", at, proven["peak"] / stock["peak"], "<=", None, "memory"),
        Bar("time / merge_and_unload's", at, merging / stock["seconds"], "<=", None, "time"),
        Bar("time with the proof / merge_and_unload's", at, proven["seconds"] / stock["seconds"], "<=", None, "time"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
