"""What is watched in every optimizer step, before it is taken: its loss, its gradient and the experts without a token.

Every rank sees the same figures, and decides the same. A noticed step's rows are appended to `noticed.jsonl` in the run
folder: `step`, `what`, `value`, `ceiling`, `action`, and `rows` by micro-batch, of all ranks. A skipped step leaves the
weights, the optimizer and the router as they were, and its figures out of the log; step count and schedule go on.
"""

import math
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from finetune.errors import Problem, RunError
from finetune.recipe.run_settings import WatchdogSettings
from finetune.run import append_line, repair_lines

FILE = "noticed.jsonl"
WINDOW, FIRST = 50, 20
"""Losses that a step is compared with: those of the last `WINDOW` steps, once there are `FIRST`."""
LEAST_SPREAD = 0.05
"""Of their mean: the least standard deviation, so that a converged loss may move a little."""
SKIPPED_IN_A_ROW, SKIPPED_LAST = 10, 3
"""After so many skipped steps in a row a run stops, and at its end after fewer: it is the model that is broken."""
SHOWN_ROWS, SHOWN_LINES = 32, 5  # in a message; warnings of a kind

_LOSS, _GRADIENT = "loss not finite", "gradient norm not finite"
_SPIKE, _DEAD, _ZERO = "loss_spike", "dead_experts", "zero_gradient"


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step, over all ranks and micro-batches; `last` is the number of the run's last one."""

    number: int
    last: int
    loss: float
    gradient_norm: float
    dead_experts: float | None = None  # share of the experts, over all layers; None: dense, or not looked at
    scaled: bool = False  # float16: the gradient scaler skips steps with overflows by itself


@dataclass(frozen=True)
class RankRows:
    """What one rank had in a noticed step: rows and loss of each micro-batch, and the first router with bad logits."""

    rows: list[list[str]]
    losses: list[float]
    router: str | None


@dataclass(frozen=True)
class Notice:
    """One thing noticed in a step. `ceiling` is None for what is never right."""

    what: str
    value: float
    ceiling: float | None
    action: str


class Watchdog:
    """Decides in each optimizer step whether it is taken; a continued run decides as an uninterrupted one."""

    def __init__(self, settings: WatchdogSettings, run_folder: Path) -> None:
        self.settings, self.path = settings, run_folder / FILE
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._zero_since: int | None = None  # the first of the last steps whose gradient was exactly 0
        self._skipped_in_a_row = 0
        self.skipped_steps = 0  # of the whole run
        self._shown: Counter[str] = Counter()

    @property
    def may_skip(self) -> bool:
        """Whether a step can be skipped at all."""
        return "skip_batch" in (self.settings.loss_spike.action, self.settings.dead_experts.action)

    def begin(self, last_step: int) -> None:
        """On the main process: remove the lines of the steps that a continued run will repeat."""
        repair_lines(self.path, last_step)

    def skips(self, step: StepFigures, gather: Callable[[], Sequence[RankRows]], writes: bool = True) -> bool:
        """Whether the step must be skipped. Raises RunError where the run must stop.

        `gather` collects every rank's rows, called only for a noticed step; `writes`: on the main process.
        """
        notices = list(self._notices(step))
        skipped = any(notice.action == "skip_batch" for notice in notices)
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if math.isfinite(step.loss):
            self._losses.append(step.loss)
        if not notices:
            return False
        ranks = gather()
        for notice in notices if writes else ():
            self._write(step.number, notice, ranks)
        for notice in notices:
            if notice.action == "stop":
                self._stop(step, notice, ranks)
        limit = min(SKIPPED_LAST, step.last) if step.number >= step.last else SKIPPED_IN_A_ROW
        if skipped and self._skipped_in_a_row >= limit:
            self._stop_skipping(step, notices)
        return skipped

    def _notices(self, step: StepFigures) -> Iterator[Notice]:
        settings = self.settings
        broken = _not_finite(step)
        if broken is not None:
            action = "skip_batch" if settings.loss_spike.action == "skip_batch" else "stop"
            yield replace(broken, action=action)
        if self._counts_as_zero(step):
            yield Notice(
                _ZERO,
                float(step.number + 1 - (self._zero_since or 0)),
                settings.zero_gradient.ceiling,
                settings.zero_gradient.action,
            )
        dead = step.dead_experts
        if dead is not None and dead > settings.dead_experts.ceiling:
            yield Notice(_DEAD, dead, settings.dead_experts.ceiling, settings.dead_experts.action)
        highest = self.highest_loss()
        if broken is None and highest is not None and step.loss > highest:
            yield Notice(_SPIKE, step.loss, highest, settings.loss_spike.action)

    def highest_loss(self) -> float | None:
        """The loss above which the next step counts as a spike; None while too few steps were seen."""
        if len(self._losses) < FIRST:
            return None
        mean = statistics.fmean(self._losses)
        spread = max(statistics.pstdev(self._losses, mean), LEAST_SPREAD * abs(mean))
        return mean + self.settings.loss_spike.ceiling * spread

    def _counts_as_zero(self, step: StepFigures) -> bool:
        """Whether the gradient has been exactly 0 for too long, or at the run's end.

        Where the loss is 0 as well there is nothing left to learn: pairs beyond the margin of `hinge`, rows known by
        heart, or no supervised token in the step.
        """
        if step.gradient_norm != 0 or step.loss == 0:
            self._zero_since = None
            return False
        self._zero_since = self._zero_since or step.number
        count, ceiling = step.number + 1 - self._zero_since, self.settings.zero_gradient.ceiling
        return count == ceiling or (count < ceiling and step.number >= step.last)

    def _write(self, step: int, notice: Notice, ranks: Sequence[RankRows]) -> None:
        value = notice.value if math.isfinite(notice.value) else str(notice.value)
        line = {"step": step, "what": notice.what, "value": value, "ceiling": notice.ceiling, "action": notice.action}
        append_line(self.path, {**line, "rows": [rows for rank in ranks for rows in rank.rows]})
        self._shown[notice.what] += 1
        if notice.action == "stop" or (shown := self._shown[notice.what]) > SHOWN_LINES:
            return
        done = ", and the step is skipped" if notice.action == "skip_batch" else ""
        more = "; further ones are only written there" if shown == SHOWN_LINES else ""
        print(f"step {step}: {_said(notice)}{done}; its rows are in {self.path}{more}", file=sys.stderr, flush=True)

    def _stop(self, step: StepFigures, notice: Notice, ranks: Sequence[RankRows]) -> NoReturn:
        if notice.what == _ZERO:
            raise _zero_gradient(step, self._zero_since or step.number)
        if notice.ceiling is None:
            raise _broken(step, notice, ranks)
        what = f"{_said(notice)}; the optimizer step was not taken; its rows are in {self.path}"
        do = (
            "look at these rows, lower training.learning_rate, or set watchdog.loss_spike.action=skip_batch"
            if notice.what == _SPIKE
            else "balance the router with router.router_aux_loss_coef, lower training.learning_rate, or set "
            "watchdog.dead_experts.action=warn"
        )
        raise RunError(Problem(f"step {step.number}", what, do))

    def _stop_skipping(self, step: StepFigures, notices: Sequence[Notice]) -> NoReturn:
        said = "; ".join(_said(notice) for notice in notices)
        what = f"{self._skipped_in_a_row} steps in a row were skipped, the last because {said}: nothing is learned"
        do = f"look at the rows in {self.path}, and start anew with a lower training.learning_rate"
        raise RunError(Problem(f"step {step.number}", what, do))

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs, as plain numbers."""
        return {
            "losses": list(self._losses),
            "zero_since": self._zero_since,
            "skipped_in_a_row": self._skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._zero_since = state["zero_since"]
        self._skipped_in_a_row, self.skipped_steps = state["skipped_in_a_row"], state["skipped_steps"]


def _not_finite(step: StepFigures) -> Notice | None:
    if not math.isfinite(step.loss):
        return Notice(_LOSS, step.loss, None, "stop")
    # In float16 overflows are expected: the gradient scaler skips the step by itself.
    if not step.scaled and not math.isfinite(step.gradient_norm):
        return Notice(_GRADIENT, step.gradient_norm, None, "stop")
    return None


def _said(notice: Notice) -> str:
    if notice.what == _SPIKE:
        return f"the loss {notice.value:.4g} is above {notice.ceiling:.4g}, far from the steps before it"
    if notice.what == _DEAD:
        return f"{notice.value:.1%} of the experts got no token, more than {notice.ceiling:.1%}"
    if notice.what == _ZERO:
        return f"the gradient is exactly 0 in {notice.value:.0f} steps in a row: nothing is learned any more"
    return f"the {notice.what.removesuffix(' not finite')} is not finite ({notice.value})"


def _zero_gradient(step: StepFigures, first: int) -> RunError:
    do = "start anew with a lower training.learning_rate"
    if first == 1:
        do = "add to lora.targets: what is adapted does not change the answers of these rows"
    what = f"the gradient is exactly 0 from step {first} on: nothing is learned any more, and no adapter was saved"
    return RunError(Problem(f"step {step.number}", what, do, f"loss {step.loss:.4g}, gradient norm 0"))


def _broken(step: StepFigures, notice: Notice, ranks: Sequence[RankRows]) -> RunError:
    """Names the rows of the micro-batches whose loss is not finite; for a gradient those of the whole step."""
    batches = [
        (loss, rows) for rank in ranks for loss, rows in zip(rank.losses, rank.rows, strict=True)
    ]  # fmt: skip
    bad = [batch for batch in batches if not math.isfinite(batch[0])] if notice.what == _LOSS else []
    named = [row for _, rows in bad or batches for row in rows]
    shown = ", ".join(named[:SHOWN_ROWS]) + (" ..." if len(named) > SHOWN_ROWS else "")
    router = next((rank.router for rank in ranks if rank.router is not None), None)
    first = "" if router is None else f"; the first router with logits that are not finite: {router}"
    return RunError(
        Problem(
            f"step {step.number}",
            f"the {notice.what.removesuffix(' not finite')} is not finite; the optimizer step was not taken{first}; "
            f"rows of the step: {shown}",
            "look at these rows, lower training.learning_rate, or use model.dtype bfloat16 instead of float16",
            got=str(bad[0][0] if bad else notice.value),
        )
    )
