"""The reference of preference tuning: the model before the first step, on the same quantised base.

With a fresh adapter that is the base with the adapter off; with an adapter from an earlier run, that adapter, whose
factors are kept as frozen copies. There is never a second base in memory, nor a merged copy.

`ReferenceStore` keeps precomputed log-probabilities of the reference in `reference/` of the run folder:

    made_from.json      fingerprints of their inputs; with others the run stops
    train.0.jsonl       one line a pair, of the pairs that process 0 computed

A line is on disk before the next batch is computed, so a killed run continues at the pair where it stopped, also with
another number of processes.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.data.types import TokenPair
from finetune.errors import Problem, RunError
from finetune.files import disk_named, write_json, write_text
from finetune.moe.sharding import local
from finetune.upstream import require_reads

require_reads("peft.tuners.tuners_utils:BaseTunerLayer.disable_adapters")


class Reference(torch.nn.Module):
    """Made before the first step. Passed to TRL as its reference model, so that it loads none of its own.

    `fresh`: the adapter is a new one that changes nothing yet, and no rows of new tokens are trained. `as_base`:
    restores the base's values of what is trained besides parameters (correction biases of routers).
    """

    def __init__(
        self, model: PeftModel, fresh: bool, as_base: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        super().__init__()
        self.config = model.config
        self._as_base = as_base
        # In a tuple, so that torch does not register the policy as a part of its reference.
        self._policy = (model,)
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if fresh else []
        trained = [] if fresh else [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._start = [(parameter, local(parameter.detach()).clone()) for parameter in trained]

    def forward(self, *_: Any, **__: Any) -> None:
        """Never called: `active` makes the policy the reference."""
        raise NotImplementedError

    @contextmanager
    def active(self) -> Iterator[PeftModel]:
        """The model in its state before the first step, without dropout, checkpointing or gradient."""
        (model,) = self._policy
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._as_base(), self._adapters_off(), self._start_parameters():
                yield model
        finally:
            model.train(training)

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        """PEFT's own switch, `disable_adapter`, would also change which parameters train."""
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer._disable_adapters = value

    @contextmanager
    def _start_parameters(self) -> Iterator[None]:
        """The parameters as they were; the optimizer keeps the same ones.

        Their values are exchanged, not their memory: FSDP2 gathers a sharded model from the memory that it knows.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, start in self._start:
            now = local(parameter.data)  # not counted as a change by autograd: the policy's graph may be waiting
            held = now.clone()
            now.copy_(start)
            start.copy_(held)


Logps = NDArray[np.float32]
"""`[pairs, 2]`: of the chosen and of the rejected answer."""

MADE_FROM = "made_from.json"


class ReferenceStore:
    """One run's reference. `made_from`: {what: its fingerprint}, of everything that the values depend on."""

    def __init__(self, folder: Path, made_from: Mapping[str, str | None]) -> None:
        self.folder, self.made_from = folder, dict(made_from)

    def open(self, is_main: bool) -> None:
        """Start a new store, or continue that of a killed run; RunError if it was made from something else."""
        path = self.folder / MADE_FROM
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [what for what in before | self.made_from if before.get(what) != self.made_from.get(what)]
            if changed:
                what = f"these log-probabilities of the reference were made from another {', '.join(changed)}"
                do = "put back what was changed to go on, or remove the folder, or name another output_dir"
                raise RunError(Problem(str(self.folder), what, do))
        elif any(self.folder.glob("*.jsonl")):
            what, do = (
                f"log-probabilities of a reference, and no {MADE_FROM} that says what they were made from",
                "remove it",
            )
            raise RunError(Problem(str(self.folder), what, do))
        elif is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.made_from)

    def missing(self, split: str, pairs: Sequence[TokenPair]) -> list[int]:
        """Indices of the pairs without a value, in order."""
        there = self._lines(split)
        return [index for index in range(len(pairs)) if index not in there]

    def append(self, split: str, rank: int, lines: Iterable[tuple[int, TokenPair, float, float]]) -> None:
        """Write (index, pair, chosen, rejected) of a batch and sync it to disk; RunError if a value is not finite."""
        path = self.folder / f"{split}.{rank}.jsonl"
        written = []
        for index, pair, *values in lines:
            if not all(map(math.isfinite, values)):
                do = "look at this row, and use model.dtype bfloat16 instead of float16"
                what = "the reference's log-probability of its answers is not finite"
                raise RunError(Problem(pair.row, what, do, got=", ".join(map(str, values))))
            written.append(json.dumps({"pair": index, "tokens": checksum(pair), "logps": values}))
        content = "".join(f"{line}\n" for line in written).encode()
        with disk_named(path, len(content)), path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def repair(self, split: str, rank: int) -> None:
        """Remove the incomplete line that a kill left at the end of this process's file."""
        path = self.folder / f"{split}.{rank}.jsonl"
        if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
            write_text(path, text[: text.rfind("\n") + 1])

    def read(self, split: str, pairs: Sequence[TokenPair]) -> Logps:
        """All values; RunError where one is missing, or was made from other tokens than the pair has now."""
        lines = self._lines(split)
        values = np.empty((len(pairs), 2), dtype=np.float32)
        for index in range(len(pairs)):
            if index not in lines:
                do = "start the run again: it computes what is missing"
                raise RunError(Problem(str(self.folder), f"the reference of {split} pair {index} is missing", do))
            tokens, values[index] = lines[index]
            if tokens != checksum(pairs[index]):
                what = "the reference's log-probabilities were made from other tokens than this row has now"
                raise RunError(Problem(pairs[index].row, what, f"put the data back, or remove {self.folder}"))
        return values

    def _lines(self, split: str) -> dict[int, tuple[int, list[float]]]:
        lines = {}
        for path in sorted(self.folder.glob(f"{split}.*.jsonl")):
            for number, line in enumerate(_whole_lines(path), start=1):
                try:
                    value = json.loads(line)
                    lines[int(value["pair"])] = int(value["tokens"]), [float(logp) for logp in value["logps"]]
                except (ValueError, KeyError, TypeError):
                    what, do = "not a line that a run has written", f"remove {self.folder}: it is computed again"
                    raise RunError(Problem(f"{path}:{number}", what, do, got=repr(line[:80]))) from None
        return lines


def _whole_lines(path: Path) -> Iterator[str]:
    *whole, _half = path.read_text(encoding="utf-8").split("\n")
    yield from whole


def checksum(pair: TokenPair) -> int:
    """CRC-32 of a pair's tokens and labels."""
    value = 0
    for ids in (pair.prompt_ids, pair.chosen_ids, pair.chosen_labels, pair.rejected_ids, pair.rejected_labels):
        value = crc32(len(ids).to_bytes(4, "little") + np.ascontiguousarray(ids).tobytes(), value)
    return value


def digest_of(pairs: Sequence[TokenPair]) -> str:
    """SHA-256 of all pairs in their order."""
    digest = hashlib.sha256()
    for index in range(len(pairs)):
        digest.update(checksum(pairs[index]).to_bytes(4, "little"))
    return digest.hexdigest()


def compute_missing(
    store: ReferenceStore,
    split: str,
    pairs: Sequence[TokenPair],
    missing: set[int],
    batches: Iterable[tuple[Sequence[Sequence[int]], bool]],
    rank: int,
    logps: Callable[[Sequence[Sequence[int]]], Any],
) -> None:
    """Compute this process's `batches` of rows of pair indices and write the `missing` pairs of those that count.

    `logps` gives `[B, 2]` for a batch. A batch of which some pairs are there already is computed as a whole: rounding
    depends on what is computed together.
    """
    store.repair(split, rank)
    for batch, counts in batches:
        values = zip(chain(*batch), logps(batch).tolist(), strict=True)
        if counts:
            store.append(split, rank, [(index, pairs[index], *logp) for index, logp in values if index in missing])
