"""Stream a base checkpoint into a merged one: several tensors at a time, each in blocks of rows.

Only a few blocks a thread are in memory. What is done to each tensor is logged (`TensorLog`), and the proof and the
figures of the report are computed from the log.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch

from finetune.adapters.deltas import Change, FactorReader
from finetune.adapters.tensors import FLOATS
from finetune.adapters.whole_tensors import TokenRows
from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorInfo, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES, read_tensor
from finetune.errors import Problem, WeightsError


@dataclass(frozen=True)
class TensorResult:
    """What was done to one tensor with a change: sums of squares in fp64, and which rows of which factors went in."""

    key: str
    part: str
    base: float
    delta: float
    rounding: float  # of what rounding to the output dtype lost, in one of every ROUNDING_SAMPLE blocks
    rounded_delta: float  # of the change in the same blocks
    changed: bool  # the change is not zero throughout
    used: tuple[tuple[int, str, int, int, int], ...]  # adapter, path, expert, first row, row past the last


@dataclass
class TensorLog:
    """The results of all tensors with a change, by key."""

    results: dict[str, TensorResult] = field(default_factory=dict)

    @property
    def targeted(self) -> set[str]:
        """Tensors whose change is not zero."""
        return {key for key, result in self.results.items() if result.changed}

    def used(self) -> dict[tuple[int, str, int], list[tuple[int, int]]]:
        """By adapter, path and expert, the rows of its change that went to disk: (row, past it)."""
        rows: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
        for result in self.results.values():
            for owner, path, expert, row, past in result.used:
                rows.setdefault((owner, path, expert), []).append((row, past))
        return rows

    def parts(self) -> dict[str, list[TensorResult]]:
        """The results by part of the model."""
        parts: dict[str, list[TensorResult]] = {}
        for result in self.results.values():
            parts.setdefault(result.part, []).append(result)
        return dict(sorted(parts.items()))


@dataclass(frozen=True)
class Sources:
    """What the merged checkpoint is made from.

    Tensors in `fixed` are copied from there; `token_rows` come in place of the base's or behind them.
    """

    base: CheckpointReader
    changes: Mapping[str, Change]
    fixed: Mapping[str, TensorInfo] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)

    def specs(self, dtype: str | None) -> list[TensorSpec]:
        """The base's tensors, floating-point ones in `dtype` ("BF16") if given; those in `fixed` as they are there."""
        infos = [self.base.info(key) for key in self.base.keys]
        specs = [TensorSpec(i.key, dtype if dtype and i.dtype in FLOATS else i.dtype, i.shape) for i in infos]
        specs = [replace(spec, dtype=self.fixed[spec.key].dtype) if spec.key in self.fixed else spec for spec in specs]
        rows = self.token_rows
        return [replace(spec, shape=rows[spec.key].shape) if spec.key in rows else spec for spec in specs]


def shard_bytes(base: CheckpointReader, specs: Sequence[TensorSpec]) -> int:
    """The largest shard of the output when it is cut as the base is: one file stays one, several stay as many or so."""
    sizes: dict[Path, int] = {}
    for spec in specs:
        file = base.info(spec.key).file
        sizes[file] = sizes.get(file, 0) + spec.nbytes
    return max(sizes.values())


# Elements of a block: 4 MiB in fp32. In smaller ones the threads wait for the interpreter's lock between operations.
BLOCK_ELEMENTS = 2**20
# From here on the file that is written to is the limit, and every thread has blocks of its own in memory.
MAX_THREADS = 8
# Sums of squares from here on are too near to the end of fp32 to say that every value is finite.
MAX_SQUARE = 1e37
# What rounding loses is the same all over a tensor: it is measured in one block of so many.
ROUNDING_SAMPLE = 16
# Share of the bound on a change's square under which sums of products say nothing of it.
EXACT_BELOW = 1e-12


def stream_merged(
    sources: Sources,
    folder: Path,
    specs: Sequence[TensorSpec],
    advance: Callable[[int], object] = lambda _: None,
    threads: int | None = None,
) -> TensorLog:
    """Write base + changes to `folder` as `specs` says; arithmetic in fp32, rounded once.

    `advance` is called with the bytes as they are written, from several threads. `threads`: tensors at a time, by
    default the number of processors. Raises WeightsError for a result that is not finite.
    """
    done: dict[str, TensorResult] = {}
    with CheckpointWriter(folder, specs, shard_bytes(sources.base, specs), wait=False) as writer:
        work = _Work(sources, writer, FactorReader(), advance)
        for result in _results(work, specs, threads or _threads()):
            if result is not None:
                done[result.key] = result
    # In the order of the file, not of the threads: the figures are sums, whose last digit depends on it.
    return TensorLog({spec.key: done[spec.key] for spec in specs if spec.key in done})


def _threads() -> int:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, MAX_THREADS)


def _results(work: "_Work", specs: Sequence[TensorSpec], threads: int) -> Iterator[TensorResult | None]:
    """Merge the tensors in their order, `threads` at a time."""
    with _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        running: set[Future[TensorResult | None]] = set()
        try:
            for spec in specs:
                running.add(pool.submit(work.merge, spec))
                # Few are submitted ahead, so that after a failure no further tensors are begun.
                if len(running) > threads:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            for future in as_completed(running):
                yield future.result()
        finally:
            work.stopped = True


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within it an operation of torch stays on its own thread: the tensors are what runs side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Work:
    """What every thread needs to merge one tensor."""

    sources: Sources
    writer: CheckpointWriter
    factors: FactorReader
    advance: Callable[[int], object]
    stopped: bool = False

    def merge(self, spec: TensorSpec) -> TensorResult | None:
        """Write one tensor; what was done to it, or None for one that was only copied."""
        sources, out = self.sources, TORCH_DTYPES[spec.dtype]
        change = sources.changes.get(spec.key)
        info = sources.fixed.get(spec.key, sources.base.info(spec.key))
        sums = _Sums(change, out, self.factors)
        for start, stop in blocks(info, None if change is None else change.step):
            if self.stopped:  # another tensor has failed
                return None
            rows = self._base_rows(spec.key, info, start, stop)
            merged = rows.to(out) if change is None else sums.add(rows, start, stop)
            if spec.key in sources.token_rows:
                merged = sources.token_rows[spec.key].put(merged, start)
            if change is None:
                _require_finite(merged, spec.key)
            self.writer.write_rows(spec.key, start, merged)
            self.advance(merged.numel() * merged.itemsize)
        if spec.key in sources.token_rows:
            beyond = sources.token_rows[spec.key].beyond(out)
            _require_finite(beyond, spec.key)
            self.writer.write_rows(spec.key, sources.token_rows[spec.key].base_rows, beyond)
        return None if change is None else sums.result()

    def _base_rows(self, key: str, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        if key in self.sources.fixed:
            return read_tensor(info.as_rows(), start, stop)
        return self.sources.base.read_rows(key, start, stop)


def blocks(info: TensorInfo, within: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut a tensor into ranges of rows, none of which straddles a multiple of `within` (the rows of one expert).

    A tensor without an axis is one block of its own.
    """
    if not info.shape:
        yield 0, 1
        return
    count, *columns = info.as_rows().shape
    step = max(1, BLOCK_ELEMENTS // max([1, *columns]))
    within = within or max(count, 1)
    for first in range(0, count, within):
        for start in range(first, first + within, step):
            yield start, min(start + step, first + within)


class _Sums:
    """Adds the change of one tensor to its rows, and keeps the sums of squares."""

    def __init__(self, change: Change | None, dtype: torch.dtype, factors: FactorReader) -> None:
        self.change, self.dtype, self.reader = change, dtype, factors
        self.base = self.delta = self.rounding = self.rounded_delta = 0.0
        self._blocks = 0
        self._memory: dict[str, torch.Tensor] = {}
        self.used: dict[tuple[int, str, int], list[tuple[int, int]]] = {}
        self._first: int | None = None  # row on disk at which the expert begins whose factors are at hand

    def add(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Base rows `start:stop` plus their change, added in fp32 and rounded once; good until the next call.

        The first block must be as large as any. Not finite: WeightsError.
        """
        assert self.change is not None
        first = start - start % self.change.step
        if first != self._first:
            self._take_factors(first)
        exact_nI = self._place("exact", rows, torch.float32).copy_(rows)
        base = _square(exact_nI)
        change = float(self._squares_n[start - first : stop - first].sum())
        exact_nI.addmm_(self._left_nR[start - first : stop - first], self._right_RI)
        merged = exact_nI if self.dtype == torch.float32 else self._place("merged", rows, self.dtype).copy_(exact_nI)
        # Both squares are finite only if all values are, and far from the end of the range; fp16 has one of its own.
        if not math.isfinite(base) or not change < MAX_SQUARE:
            _raise_not_finite(self.change.key)
        if self.dtype == torch.float16:
            _require_finite(merged, self.change.key)
        self.base, self.delta = self.base + base, self.delta + change
        if self._blocks % ROUNDING_SAMPLE == 0:
            self.rounding += _square(exact_nI - merged)
            self.rounded_delta += change
        self._blocks += 1
        for delta in self.change.at(start):
            expert, row = delta.place(start)
            self._use((delta.owner, delta.path, expert), row, row + stop - start)
        return merged

    def _place(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Memory of the shape of `rows`, the same for every block: fresh memory costs more than the arithmetic."""
        if name not in self._memory:
            self._memory[name] = torch.empty(rows.numel(), dtype=dtype)
        return self._memory[name][: rows.numel()].view(rows.shape)

    def _take_factors(self, first: int) -> None:
        """Those of the expert that begins at row `first`, and the squares of its change's rows.

        Of L R they are the diagonal of L (R R^T) L^T, in fp64; the change itself is not formed.
        """
        assert self.change is not None
        self._first = first
        self._left_nR, self._right_RI = self.change.factors(first, self.reader)
        left_nR, right_RI = self._left_nR.double(), self._right_RI.double()
        gram_RR = right_RI @ right_RI.T
        self._squares_n = ((left_nR @ gram_RR) * left_nR).sum(dim=1)
        if float(self._squares_n.sum()) < EXACT_BELOW * float(left_nR.square().sum()) * float(gram_RR.trace()):
            self._squares_n = torch.stack([(row_R @ right_RI).square().sum() for row_R in left_nR])

    def _use(self, factors: tuple[int, str, int], row: int, past: int) -> None:
        """Note rows of one expert's factors; those that go on where others ended are one range with them."""
        ranges = self.used.setdefault(factors, [])
        if ranges and ranges[-1][1] == row:
            ranges[-1] = ranges[-1][0], past
        else:
            ranges.append((row, past))

    def result(self) -> TensorResult:
        """What was done, of a tensor that is whole."""
        assert self.change is not None
        return TensorResult(
            key=self.change.key,
            part=self.change.part,
            base=self.base,
            delta=self.delta,
            rounding=self.rounding,
            rounded_delta=self.rounded_delta,
            changed=self.delta > 0,
            used=tuple((*factors, *rows) for factors, ranges in self.used.items() for rows in ranges),
        )


def _square(x: torch.Tensor) -> float:
    return float(x.reshape(-1).dot(x.reshape(-1)))


def _require_finite(rows: torch.Tensor, key: str) -> None:
    if rows.is_floating_point() and rows.numel() and not bool(torch.stack(torch.aminmax(rows)).isfinite().all()):
        _raise_not_finite(key)


def _raise_not_finite(key: str) -> NoReturn:
    do = "check the base, the adapter (a run that diverged?) and, with --dtype float16, the range of the weights"
    raise WeightsError(Problem(key, "merged tensor is not finite", do))
