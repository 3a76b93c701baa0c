"""Train from a recipe.

    accelerate launch -m finetune.train recipes/quickstart/sft-qlora.yaml training.max_steps=5

The recipe is validated before torch is imported: packages that import torch are imported inside the functions.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.environment import hush, print_plainly, wait_passively
from finetune.errors import Problem, RecipeError, RunError
from finetune.files import write_json, write_text
from finetune.launcher import check_launcher, rank
from finetune.progress import PROGRESS, phase
from finetune.recipe import Recipe, dump_recipe, load_recipe
from finetune.stopping import stop

if TYPE_CHECKING:
    from finetune.adapters.initial import InitialAdapter
    from finetune.base import Base
    from finetune.methods.common import MethodRows, TrainerSetup
    from finetune.moe.esft import ExpertChoice
    from finetune.run import RunFolder


_SECONDS_TO_SAY_IT_ONCE = 10


def train(recipe: Recipe, command_line: Sequence[str], allowed: Sequence[str] = ()) -> Path:
    """Start the recipe's run, continue it, or say that it is finished; returns the run folder.

    `allowed`: keys of the recipe that may differ from those that a continued run began with.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch.accelerator import is_available
    from transformers import set_seed

    from finetune.base import read_base
    from finetune.methods import method_of
    from finetune.methods.common import TrainerSetup
    from finetune.methods.trainer_checks import check_schedule, check_trainer
    from finetune.run import RunFolder, check_keys, newest_step, prepare_dashboards
    from finetune.run.ranks import start_timeout, watch_ranks

    check_keys(allowed)
    for line in check_launcher(recipe, os.environ):
        if rank() == 0:
            print(line)
    # Without `cpu`, on a machine without an accelerator, each process would assume that it is the only one.
    on_cpu = not is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, timeout=start_timeout(recipe.training.rank_timeout))
    watch_ranks(recipe.training.rank_timeout)
    _reject_data_parallel(state)
    check_trainer(recipe, state.num_processes)  # raises for settings that the trainer would refuse later
    set_seed(recipe.seed)

    # 1. The run folder, which no other process may hold, and the recipe of the run that it holds
    run = RunFolder(Path(recipe.output_dir))
    PROGRESS.recipe, PROGRESS.run = recipe, run.path
    start = _open_run(run, recipe, allowed)

    # 2. The base without its weights, and the adapter to start from; raises where the recipe does not fit them
    base = read_base(recipe)
    initial_adapter = _initial_adapter(recipe, base)

    # 3. Rows -> token ids and labels
    method = method_of(recipe.method.kind)
    _set_template_day(base, run, start.continues)
    with phase("preparing rows"):
        rows = method.prepare_rows(recipe, base)
    steps = recipe.training.optimizer_steps(len(rows.train))
    for remark in check_schedule(recipe, steps, state.num_processes):
        _say(remark)

    # 4. Everything is checked: the run begins, continues, or is finished
    start = _begin(start, run, recipe, base, rows, initial_adapter, allowed, command_line)
    if start.is_finished:
        _say(f"the run in {run.path} is finished: its adapter is {run.adapter}")
        return run.path
    dashboards = prepare_dashboards(recipe.logging, run, recipe.model_dump(mode="json"))

    # 5. 4-bit base and adapter (of selected experts with `lora.experts: auto`), compared with the recipe by the audit
    model, choice = _load(recipe, base, run, rows, initial_adapter, start.continues)
    _audit(model, base, recipe, rows, run, state.is_main_process)

    # 6. The method's trainer
    setup = TrainerSetup(
        recipe, run, base, model, rows, initial_adapter, dashboards, choice, start.identity, start.checkpoint
    )
    trainer = method.make_trainer(setup)

    # 7. Train, from the newest whole checkpoint if there is one, with an evaluation after the last step; save
    if not _train_and_save(setup, trainer):
        _say(stop.line(run.path, newest_step(run.path), recipe.training.resume))
    for callback in dashboards.callbacks:
        callback.finish()
    return run.path


def _train_and_save(setup: "TrainerSetup", trainer: Any) -> bool:
    """Train and write the adapter; False if a signal has ended the training, with a checkpoint, before its last step."""
    from accelerate import PartialState

    from finetune.run import say_that_it_ends, write_waiting_lines
    from finetune.run.ranks import ranks_training

    run, state = setup.run, PartialState()
    stop.when_requested(partial(say_that_it_ends, run.path))
    with stop.deferred():  # until the checkpoint or the adapter is whole
        try:
            with phase("training"), ranks_training():
                finished: bool = trainer.run_from(setup.checkpoint)
            with phase("saving the adapter"):
                if state.is_main_process:
                    _save(setup, trainer) if finished else _draw(run)
        finally:
            write_waiting_lines(run.path)
        state.wait_for_everyone()
    if finished:
        stop.requested = None  # in the last step: there is nothing to continue
    return finished


def _say(*lines: str) -> None:
    """Print on the main process."""
    for line in lines if rank() == 0 else ():
        print(line, flush=True)


def _reject_data_parallel(state: Any) -> None:
    """Raise RunError for several visible GPUs in one process: the trainer would fall back to `nn.DataParallel`."""
    from torch.cuda import device_count

    if state.num_processes == 1 and state.device.type == "cuda" and device_count() > 1:
        raise RunError(
            Problem(
                "accelerate",
                "one process was launched and several GPUs are visible",
                "use --config_file accelerate_configs/multi_gpu.yaml, or set CUDA_VISIBLE_DEVICES=0",
                got=f"{device_count()} GPUs",
            )
        )


@dataclass(frozen=True)
class _Start:
    """How a run starts. `continues`: as the run that its folder holds; `checkpoint`: None for the first step.

    `changed`: something is not as it was when the run began, which the user allows.
    """

    continues: bool
    changed: bool = False
    identity: str = ""
    is_finished: bool = False
    checkpoint: Path | None = None


def _open_run(run: "RunFolder", recipe: Recipe, allowed: Sequence[str]) -> _Start:
    """Lock the run folder, and find out whether it holds a run to continue.

    Raises RunError where another process trains in it, where it holds something else, or the run of another recipe.
    """
    from finetune.run import check_allowed, earlier_recipe, lock_run, recipe_changes
    from finetune.run.resume import NEVER

    def look() -> _Start:
        run.check_contents()
        lock_run(run.path)
        before = earlier_recipe(run)
        if before is None or recipe.training.resume == NEVER:
            return _Start(continues=False)
        lines = check_allowed(run, recipe_changes(before, recipe), allowed)
        _say(*lines)
        return _Start(continues=True, changed=bool(lines))

    return _on_main(look)


def _begin(
    start: _Start,
    run: "RunFolder",
    recipe: Recipe,
    base: "Base",
    rows: "MethodRows",
    initial_adapter: "InitialAdapter | None",
    allowed: Sequence[str],
    command_line: Sequence[str],
) -> _Start:
    """Compare base and rows with those of the run to continue, choose its checkpoint, and record how it goes on."""
    from finetune.base import base_changes
    from finetune.run import check_allowed, identity_of, row_changes
    from finetune.run.resume import begin_anew, go_on

    def go() -> _Start:
        adapter = None if initial_adapter is None else initial_adapter.digest()
        identity = identity_of(recipe, base.provenance.as_dict(), rows.counts(), adapter)
        changed = start.changed
        if start.continues:
            changes = [*base_changes(base, run), *row_changes(run, rows.counts())]
            lines = check_allowed(run, changes, allowed)
            _say(*lines)
            changed = changed or bool(lines)
            begun = go_on(run, recipe.training.resume, identity, changed)
        else:
            begun = begin_anew(run, identity)
        _say(*begun.lines)
        if not begun.is_finished:
            _write_recipe_and_provenance(run, recipe, base, command_line)
        return replace(start, identity=begun.identity, is_finished=begun.is_finished, checkpoint=begun.checkpoint)

    return _on_main(go)


def _on_main(decide: "Callable[[], _Start]") -> _Start:
    """What the main process decides, on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    decided = [decide() if PartialState().is_main_process else None]
    broadcast_object_list(decided)
    assert decided[0] is not None
    return decided[0]


def _initial_adapter(recipe: Recipe, base: "Base") -> "InitialAdapter | None":
    """The adapter to start from. Raises WeightsError where base, quantization, template or `lora` section differ."""
    from finetune.adapters.initial import check_same_setup, read_initial_adapter

    if recipe.model.adapter is None:
        return None
    initial_adapter = read_initial_adapter(Path(recipe.model.adapter))
    check_same_setup(initial_adapter, recipe, base.provenance, base.tokenizer.chat_template)
    return initial_adapter


def _set_template_day(base: "Base", run: "RunFolder", continues: bool) -> None:
    """A template that writes a date writes that of the run's first start, on every process and after every restart."""
    from accelerate.utils import broadcast_object_list

    from finetune.data import set_template_day, template_day
    from finetune.run import recorded_template_day

    days = [(recorded_template_day(run) if continues else None) or template_day(base.tokenizer)]
    set_template_day(base.tokenizer, broadcast_object_list(days)[0])


def _load(
    recipe: Recipe,
    base: "Base",
    run: "RunFolder",
    rows: "MethodRows",
    initial_adapter: "InitialAdapter | None",
    continues: bool,
) -> "tuple[Any, ExpertChoice | None]":
    """Base model and adapter; with `lora.experts: auto` also the chosen experts.

    They are measured on the rows, unless the adapter to start from, or the run that continues, has a choice already.
    """
    from accelerate import PartialState

    from finetune.model import adapt, load_base
    from finetune.moe.esft import choose_experts, read_choice

    auto = recipe.lora.experts == "auto"
    choice = None if initial_adapter is None else initial_adapter.choice
    if auto and choice is None and continues:
        choice = read_choice(run.experts)
    with phase("loading the base"):
        model = load_base(base, recipe.model)
    if auto and choice is None and base.family.moe is not None:
        with phase("measuring experts"):
            choice = choose_experts(model, base.family.moe, rows.conversations, rows.conversation_collator, recipe)
    if choice is not None and PartialState().is_main_process:
        choice.write(run.experts)
        print("\n".join(choice.lines()))
    return adapt(model, base, recipe, choice, initial_adapter), choice


def _audit(model: Any, base: "Base", recipe: Recipe, rows: "MethodRows", run: "RunFolder", is_main: bool) -> None:
    """Print and write the audit; raise RunError where the model in memory differs from the recipe."""
    from finetune.data import template_day
    from finetune.moe.audit import audit_model, audit_table, check_audit

    parts = audit_model(model, base.family)
    if is_main:
        audit = {"parts": [part.as_dict() for part in parts.values()], "rows": rows.counts()}
        write_json(run.audit, {**audit, "template_day": template_day(base.tokenizer)})
        print(audit_table(parts))
        for split, stats in rows.stats.items():
            print(f"{split} rows: " + "\n".join(stats.lines()))
        for remark in rows.remarks:
            print(remark)
    check_audit(parts, recipe)


def _write_recipe_and_provenance(run: "RunFolder", recipe: Recipe, base: "Base", command_line: Sequence[str]) -> None:
    from finetune.run import collect_provenance

    write_text(run.recipe, dump_recipe(recipe))
    write_json(run.provenance, collect_provenance(base.provenance.as_dict(), recipe.seed, list(command_line)))


def _save(setup: "TrainerSetup", trainer: Any) -> None:
    """Draw the curves and write the adapter in PEFT's format, with its card and `finetune.json`: the run is finished.

    The pictures come first: a run with an adapter is finished, and nothing of it is made again.
    """
    from finetune.checkpoint import new_folder, sync_files, write_sums
    from finetune.methods.checkpointing import adapter_facts, write_adapter
    from finetune.model import snapshot_adapter

    run = setup.run
    _draw(run)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter, facts = snapshot_adapter(model, setup.base.family), adapter_facts(setup)
    with new_folder(run.adapter) as folder:
        write_adapter(folder, setup, adapter, facts)
        write_sums(folder)
        sync_files(folder)
    print(f"adapter: {run.adapter}")


def _draw(run: "RunFolder") -> None:
    """The curves of what was done. A picture that fails is said, and does not end a run."""
    from finetune.run import draw_loss_curve, draw_router_load

    try:
        draw_loss_curve(run.metrics, run.loss_curve)
        draw_router_load(run.router_load, run.router_load_picture)
    except Exception as error:
        print(f"{run.path}: a picture could not be drawn ({type(error).__name__}: {error}); the run is not affected")


def _finish() -> None:
    """The process ends, and no other one waits for it."""
    from finetune.run.ranks import finish_ranks

    finish_ranks()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m finetune.train RECIPE [key.path=value ...]`: what `accelerate launch` starts on every process."""
    wait_passively()
    hush()
    print_plainly()
    parser = argparse.ArgumentParser(prog="finetune.train", description="Train from a recipe.")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", help="settings to change: key.path=value")
    parser.add_argument("--allow-change", action="append", default=[], help="as of `finetune train`")
    args = parser.parse_args(argv)
    try:
        train(load_recipe(args.recipe, args.overrides), [sys.executable, *sys.argv], args.allow_change)
        _finish()
    except RecipeError as error:
        if rank() > 0:
            time.sleep(_SECONDS_TO_SAY_IT_ONCE)  # every process has the same; the launcher ends this one
        print(error, file=sys.stderr)
        return error.exit_code
    except Exception as error:
        from finetune.run.failure import end_run  # imports torch, without which a recipe is checked

        return end_run(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
