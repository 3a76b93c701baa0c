"""What every measurement shares: interleaved repeats, medians, bars, and a record that says where it was taken."""

import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.files import write_json
from finetune.run.provenance import collect_provenance

REPEATS = 7
TIME_BAR_ASSERTED = 0.8  # share of a time bar that a test holds on a shared machine
Kind = Literal["time", "memory", "count"]


@dataclass(frozen=True)
class Timings:
    """Seconds of one step, one value a round, of arms that took turns: round i of all arms saw the same machine."""

    seconds: dict[str, list[float]]

    def median(self, arm: str) -> float:
        """Median seconds of one step."""
        return statistics.median(self.seconds[arm])

    def ratio(self, over: str, under: str) -> float:
        """Median over the rounds of time(over) / time(under)."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def interleaved(
    arms: Mapping[str, Callable[[], object]],
    repeats: int | Callable[[float], int] = REPEATS,
    clock: Callable[[], float] = time.process_time,
    at_least: float = 0.03,
) -> Timings:
    """Time the arms in turns, each after warm-up; every second round runs in reverse order.

    One timing is a whole number of steps that lasts `at_least` seconds, measured at the warm-up. The default clock
    counts the processor time of this process: on one thread the step's own time, whatever else the machine does. A
    device needs `wall_clock`, which waits for it. `repeats` may decide when it knows the seconds of one round.
    """
    for step in arms.values():
        step()
    first = {name: _timed(step, 1, clock) for name, step in arms.items()}
    steps = {name: max(1, math.ceil(at_least / seconds)) for name, seconds in first.items()}
    if callable(repeats):
        repeats = repeats(sum(steps[name] * first[name] for name in arms))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats):
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            seconds[name].append(_timed(arms[name], steps[name], clock))
    return Timings(seconds)


def wall_clock() -> float:
    """Seconds on the wall once the CUDA device, where there is one, has done all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _timed(step: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Seconds of one of `times` steps."""
    started = clock()
    for _ in range(times):
        step()
    return (clock() - started) / times


@dataclass(frozen=True)
class Bar:
    """One line of the table: what was measured, where it should stand. `limit` None: reported without a bar."""

    ratio: str
    at: str
    measured: float
    sign: Literal["<=", ">="]
    limit: float | None
    kind: Kind

    def holds(self, share: float = 1.0) -> bool:
        """Whether the measured value stands within `share` of the bar (memory and counts: always the whole bar)."""
        if self.limit is None:
            return True
        share = share if self.kind == "time" else 1.0
        return self.measured <= self.limit / share if self.sign == "<=" else self.measured >= self.limit * share

    def record(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return vars(self) | {"pass": None if self.limit is None else self.holds()}


def table(bars: Sequence[Bar]) -> str:
    """The bars as text, one a line."""
    lines = [f"{'ratio':<58}{'at':<30}{'bar':>9}{'measured':>10}  pass"]
    lines.append("-" * len(lines[0]))
    for bar in bars:
        limit = "-" if bar.limit is None else f"{bar.sign} {bar.limit:.2f}"
        verdict = "-" if bar.limit is None else "yes" if bar.holds() else "NO"
        lines.append(f"{bar.ratio:<58}{bar.at:<30}{limit:>9}{bar.measured:>10.3f}  {verdict}")
    return "\n".join(lines)


def provenance(seed: int) -> dict[str, Any]:
    """Date, commit and whether it had changes, versions, hardware and threads.

    A copy without git's own folder gets its commit from `BENCH_COMMIT`.
    """
    facts = collect_provenance({}, seed, [])
    del facts["command_line"], facts["base"]
    if facts["git"] is None and (described := os.environ.get("BENCH_COMMIT")):
        facts["git"] = {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}
    facts["packages"]["peft"] = metadata.version("peft")
    facts["hardware"] |= {"cpu": _cpu_model(), "torch_threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    return facts | {"finished": datetime.now(UTC).isoformat(timespec="seconds")}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.processor()


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(result)))
    print(f"\nwritten: {path}")
