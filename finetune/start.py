"""How a run starts: its folder is locked, compared with the recipe, base and rows, and made ready.

The main process decides; the others are told.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from finetune.adapters.initial import InitialAdapter
from finetune.base import Base, base_changes
from finetune.errors import Problem, RunError
from finetune.files import write_json, write_text
from finetune.recipe import Recipe, dump_recipe
from finetune.run import (
    RunFolder,
    check_allowed,
    collect_provenance,
    earlier_recipe,
    identity_of,
    lock_run,
    recipe_changes,
    row_changes,
)
from finetune.run.resume import AUTO, NEVER, begin_anew, go_on


@dataclass(frozen=True)
class Start:
    """How a run starts. `continues`: as the run that its folder holds; `checkpoint`: None for the first step.

    `changed`: something is not as it was when the run began, which the user allows. `lines` for the user.
    """

    continues: bool
    changed: bool = False
    identity: str = ""
    is_finished: bool = False
    checkpoint: Path | None = None
    lines: tuple[str, ...] = ()


def open_run(run: RunFolder, recipe: Recipe, allowed: Sequence[str]) -> Start:
    """Lock the run folder, and find out whether it holds a run to continue.

    Raises RunError where another process trains in it, where it holds something else, or the run of another recipe.
    """

    def look() -> Start:
        run.check_contents()
        lock_run(run.path)
        before = earlier_recipe(run)
        if before is None and recipe.training.resume not in (AUTO, NEVER):
            what, do = "there is no run in output_dir to go back in", "name its output_dir, or write auto"
            raise RunError(Problem("training.resume", what, do, got=recipe.training.resume))
        if before is None or recipe.training.resume == NEVER:
            return Start(continues=False)
        lines = check_allowed(run, recipe_changes(before, recipe), allowed)
        return Start(continues=True, changed=bool(lines), lines=tuple(lines))

    return _on_main(look)


def begin(
    start: Start,
    run: RunFolder,
    recipe: Recipe,
    base: Base,
    rows: dict[str, dict[str, Any]],
    initial_adapter: InitialAdapter | None,
    allowed: Sequence[str],
    command_line: Sequence[str],
) -> Start:
    """Compare base and rows with those of the run to continue, choose its checkpoint, and record how it goes on.

    `rows`: the counts of each split, as the audit has them. Nothing in the folder is changed before.
    """

    def go() -> Start:
        adapter = None if initial_adapter is None else initial_adapter.digest()
        identity = identity_of(recipe, base.provenance.as_dict(), rows, adapter)
        lines: list[str] = []
        if start.continues:
            lines += check_allowed(run, [*base_changes(base, run), *row_changes(run, rows)], allowed)
            begun = go_on(run, recipe.training.resume, identity, start.changed or bool(lines))
        else:
            begun = begin_anew(run, identity)
        if not begun.is_finished:
            write_text(run.recipe, dump_recipe(recipe))
            provenance = collect_provenance(base.provenance.as_dict(), recipe.seed, list(command_line))
            write_json(run.provenance, provenance)
        lines += begun.lines
        return replace(
            start,
            identity=begun.identity,
            is_finished=begun.is_finished,
            checkpoint=begun.checkpoint,
            lines=tuple(lines),
        )

    return _on_main(go)


def _on_main(decide: Callable[[], Start]) -> Start:
    """What the main process decides, on every process."""
    decided = [decide() if PartialState().is_main_process else None]
    broadcast_object_list(decided)
    assert decided[0] is not None
    return decided[0]
