"""The change that adapters make to each tensor on disk, computed in blocks of rows.

Factors are read from disk as they are needed. PEFT keeps one pair of factors for all experts of a stack: `lora_A
[E*r, in]` is expert-major, `lora_B [out, E*r]` is rank-major (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`);
other tools write `lora_B` expert-major, too. On disk a stack of experts is E times one or more matrices (Mixtral's
`gate_up_proj` is `w1` over `w3`, and each uses its own rows of `lora_B`), or one tensor [E, O, I], or [E, I, O] where
the architecture multiplies from the right.

E experts, O output and I input features, r LoRA rank, n rows of a block.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import torch

from finetune.adapters.adapter import WEIGHTS_FILE, Adapter
from finetune.adapters.factor_layouts import resolved_targets
from finetune.adapters.targets import Target
from finetune.adapters.tensors import PREFIX, FactorPair
from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import read_tensor
from finetune.errors import Problem, WeightsError
from finetune.moe.families import Family

# One expert's part of `lora_B` is every E-th column: taken from disk each time, all experts' would be read for each
# expert. So those of the last stacks are at hand in order; gate and down projections take turns on disk, of two layers
# where threads work at the border of one and the next.
STACKS_AT_HAND = 4
ROWS_AT_A_TIME = 1024


class FactorReader:
    """The factors of one expert of a pair, in fp32; may be asked by several threads."""

    def __init__(self) -> None:
        self._at_hand: OrderedDict[FactorPair, torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def a(self, pair: FactorPair, experts: int, expert: int) -> torch.Tensor:
        """`A_e [r, in]`."""
        r = pair.a.shape[0] // experts
        return read_tensor(pair.a, expert * r, (expert + 1) * r).float()

    def b(self, pair: FactorPair, experts: int, expert: int, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of `B_e [out, r]`."""
        if experts == 1:
            return read_tensor(pair.b, start, stop).float()
        return self._stack(pair, experts)[expert, start:stop].float()

    def _stack(self, pair: FactorPair, experts: int) -> torch.Tensor:
        with self._lock:
            if pair not in self._at_hand:
                while len(self._at_hand) >= STACKS_AT_HAND:
                    self._at_hand.popitem(last=False)
                self._at_hand[pair] = _in_order(pair, experts)
            self._at_hand.move_to_end(pair)
            return self._at_hand[pair]


def _in_order(pair: FactorPair, experts: int) -> torch.Tensor:
    """`lora_B` as [E, out, r], a few rows at a time."""
    out, columns = pair.b.shape
    B_EOr: torch.Tensor | None = None
    for start in range(0, out, ROWS_AT_A_TIME):
        B_nR = read_tensor(pair.b, start, start + ROWS_AT_A_TIME)
        B_Enr = contiguous_ranks(B_nR, experts) if pair.expert_major else by_expert(B_nR, experts)
        if B_EOr is None:
            B_EOr = B_Enr.new_empty(experts, out, columns // experts)
        B_EOr[:, start : start + ROWS_AT_A_TIME] = B_Enr
    assert B_EOr is not None
    return B_EOr


def by_expert(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
    """Rank-major rows of `lora_B` [n, r*E] as [E, n, r]."""
    return B_nR.reshape(B_nR.shape[0], -1, experts).permute(2, 0, 1)


def contiguous_ranks(B_nR: torch.Tensor, experts: int) -> torch.Tensor:
    """Expert-major rows of `lora_B` [n, E*r] as [E, n, r]."""
    return B_nR.reshape(B_nR.shape[0], experts, -1).transpose(0, 1)


@dataclass(frozen=True)
class Delta:
    """The change of one tensor on disk by one adapter: `scale * B_e @ A_e` for each expert that it holds."""

    key: str
    part: str  # as `Family.part` names it
    owner: int  # which of the merge's adapters
    path: str
    pair: FactorPair
    scale: float  # the adapter's own times its weight in the merge
    experts: int  # of the factors
    expert: int  # the first one in this tensor
    first_row: int  # of the factors' output features
    shape: tuple[int, int]  # of one expert on disk
    transposed: bool = False  # on disk [I, O]
    at: int | None = None  # the first of its rows on disk, where the tensor has others too

    @property
    def extent(self) -> int:
        """How many rows of one expert all tensors of this delta's path must take together."""
        return self.pair.a.shape[1] if self.transposed else self.pair.b.shape[0]

    def covers(self, start: int) -> bool:
        """Whether row `start` of the tensor on disk is one that it changes."""
        return self.at is None or self.at <= start < self.at + self.shape[0]

    def place(self, start: int) -> tuple[int, int]:
        """The expert that row `start` of the tensor on disk belongs to, and which row of the expert's it is."""
        expert, row = divmod(start - (self.at or 0), self.shape[0])
        return self.expert + expert, self.first_row + row

    def factors(self, start: int, factors: FactorReader) -> tuple[torch.Tensor, torch.Tensor]:
        """The change of the expert that row `start` on disk belongs to: left [rows on disk, r], scaled, and right.

        Their product are the rows of this expert in this tensor from `start` on, fp32; right is [r, I], or [r, O] where
        transposed.
        """
        expert, first = self.place(start)
        A_rI = factors.a(self.pair, self.experts, expert)
        past = self.first_row + self.shape[0]
        if self.transposed:
            B_Or = factors.b(self.pair, self.experts, expert, 0, self.pair.b.shape[0])
            return A_rI[:, first:past].T * self.scale, B_Or.T
        return factors.b(self.pair, self.experts, expert, first, past) * self.scale, A_rI


@dataclass(frozen=True)
class Change:
    """Everything that is added to one tensor on disk: the deltas of one or more adapters."""

    key: str
    part: str
    deltas: tuple[Delta, ...]

    @property
    def step(self) -> int:
        """A block of rows within a multiple of this is of one expert, and of one matrix of it."""
        return min(delta.shape[0] for delta in self.deltas)

    def at(self, start: int) -> list[Delta]:
        """The deltas of row `start`, and so of its block; none where it is of an expert that no adapter changes."""
        return [delta for delta in self.deltas if delta.covers(start)]

    def factors(self, start: int, factors: FactorReader) -> tuple[torch.Tensor, torch.Tensor]:
        """Left [step, R] and right [R, columns], fp32, of the rows from `start`, where a step begins: all deltas.

        R is the sum of the ranks: a sum of products is one product.
        """
        pairs = [delta.factors(start, factors) for delta in self.at(start)]
        if not pairs:
            return torch.zeros(self.step, 0), torch.zeros(0, self.deltas[0].shape[1])
        lefts, rights = [left[: self.step] for left, _ in pairs], [right for _, right in pairs]
        return (lefts[0], rights[0]) if len(pairs) == 1 else (torch.cat(lefts, dim=1), torch.cat(rights))


def together(plans: Iterable[Mapping[str, Sequence[Delta]]]) -> dict[str, Change]:
    """The plans of several adapters as one."""
    deltas_by_key: dict[str, list[Delta]] = {}
    for changes in plans:
        for key, deltas in changes.items():
            deltas_by_key.setdefault(key, []).extend(deltas)
    return {key: Change(key, deltas[0].part, tuple(deltas)) for key, deltas in deltas_by_key.items()}


def plan(
    base: CheckpointReader, adapter: Adapter, family: Family, weight: float = 1.0, owner: int = 0
) -> dict[str, list[Delta]]:
    """Every on-disk tensor that the adapter changes, `weight` times; several deltas where they are of single experts.

    Raises WeightsError (all problems at once) for factors that match nothing in the base, for targets without factors,
    and for shapes or ranks that do not fit.
    """
    targets = resolved_targets(base, adapter, family)
    where = str(adapter.folder / WEIGHTS_FILE)
    unused = sorted(set(adapter.pairs) - {target.path for target in targets})
    problems = [
        Problem(where, "tensor matches nothing in the base", "merge into the base it was trained on", f"{PREFIX}{path}")
        for path in unused
    ]
    deltas: dict[str, list[Delta]] = {}
    for target in targets:
        if target.path not in adapter.pairs:
            do = "the adapter is incomplete: save it again"
            problems.append(Problem(where, f"has no factors for {target.name}, which its settings name", do))
            continue
        of_target = _deltas(base, adapter, target, weight, owner)
        if isinstance(of_target, Problem):
            problems.append(of_target)
        else:
            for delta in of_target:
                deltas.setdefault(delta.key, []).append(delta)
    if problems:
        raise WeightsError(problems)
    return deltas


def _deltas(
    base: CheckpointReader, adapter: Adapter, target: Target, weight: float, owner: int
) -> list[Delta] | Problem:
    # The matrix of one expert, for each of the tensors that lie along its output axis; the first key stands for all.
    shapes = [(int(shape[-2]), int(shape[-1])) for shape in (base.info(key).shape for key in target.keys[0])]
    if target.piece is not None:
        shapes = [(target.piece[1], columns) for _, columns in shapes]
    problem = _misfit(adapter, target, shapes)
    if problem is not None:
        return problem
    deltas = []
    for expert, keys in enumerate(target.keys):
        first_row = 0
        for key, shape in zip(keys, shapes, strict=True):
            delta = Delta(
                key=key,
                part=target.part,
                owner=owner,
                path=target.path,
                pair=replace(adapter.pairs[target.path], expert_major=target.order.expert_major),
                scale=weight * adapter.scale(target.name),
                experts=target.experts,
                expert=expert,
                first_row=first_row,
                shape=shape,
                transposed=target.transposed,
                at=None if target.piece is None else target.piece[0],
            )
            deltas.append(delta)
            first_row += shape[0]
    return deltas


def _misfit(adapter: Adapter, target: Target, shapes: list[tuple[int, int]]) -> Problem | None:
    """What is wrong with the factors' shapes, if anything."""
    pair, r = adapter.pairs[target.path], adapter.rank(target.name)
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    inputs, outputs = (rows, columns) if target.transposed else (columns, rows)
    expected = ((target.experts * r, inputs), (outputs, target.experts * r))
    if (pair.a.shape, pair.b.shape) == expected:
        return None
    where = f"{adapter.folder / WEIGHTS_FILE}: {PREFIX}{target.path}"
    got = f"A {list(pair.a.shape)} and B {list(pair.b.shape)}"
    do = f"A {list(expected[0])} and B {list(expected[1])} fit r={r} and the base"
    if target.experts > 1:
        do += f" of {target.experts} experts"
    if (pair.a.shape[1], pair.b.shape[0]) == (outputs, inputs) != (inputs, outputs):
        return Problem(where, "made for another layout: input and output are swapped", do, got)
    return Problem(where, "shape or rank does not fit", do, got)
