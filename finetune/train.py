"""Train from a recipe.

    accelerate launch -m finetune.train recipes/quickstart/sft-qlora.yaml training.max_steps=5

The recipe is validated before torch is imported: packages that import torch are imported inside the functions.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.environment import hush, no_telemetry, print_plainly, wait_passively
from finetune.errors import DiskError, Problem, RunError
from finetune.failures import (
    end_run,
    finish_ranks,
    group_arguments,
    lost_rank,
    ranks_training,
    start_timeout,
    watch_ranks,
)
from finetune.files import write_json
from finetune.launcher import check_launcher, launcher_process, rank
from finetune.parallelism import Parallelism, first_line
from finetune.progress import PROGRESS, phase
from finetune.recipe import Recipe, load_recipe
from finetune.stopping import Interrupted, stop

if TYPE_CHECKING:
    from finetune.adapters.initial import InitialAdapter
    from finetune.base import Base
    from finetune.methods.common import MethodRows, TrainerSetup
    from finetune.moe.esft import ExpertChoice
    from finetune.run import RunFolder


_SECONDS_WITHOUT_LAUNCHER = 600


def train(recipe: Recipe, command_line: Sequence[str], allowed: Sequence[str] = ()) -> Path:
    """Start the recipe's run, continue it, or say that it is finished; returns the run folder.

    `allowed`: keys of the recipe that may differ from those that a continued run began with.
    """
    try:
        return _train(recipe, command_line, allowed)
    finally:
        from finetune.run import unlock_run

        unlock_run(Path(recipe.output_dir))


def _train(recipe: Recipe, command_line: Sequence[str], allowed: Sequence[str]) -> Path:
    from transformers import set_seed

    from finetune.base import read_base
    from finetune.methods import method_of
    from finetune.methods.arguments import micro_batch_remarks
    from finetune.methods.common import TrainerSetup
    from finetune.methods.trainer_checks import check_schedule, check_trainer
    from finetune.run import RunFolder, check_keys, newest_step, prepare_dashboards
    from finetune.start import begin, open_run

    check_keys(allowed)
    parallelism, remarks = check_launcher(recipe, os.environ)
    state = _processes(recipe.training.rank_timeout)
    _reject_data_parallel(state)
    _say(_first_line(parallelism, state), *remarks)
    check_trainer(recipe, state.num_processes)  # raises for settings that the trainer would refuse later
    _say(*micro_batch_remarks(recipe, state.num_processes))
    set_seed(recipe.seed)

    # 1. The run folder, which no other process may hold, and the recipe of the run that it holds
    run = RunFolder(Path(recipe.output_dir))
    PROGRESS.recipe, PROGRESS.run = recipe, run.path
    start = open_run(run, recipe, allowed)
    _say(*start.lines)

    # 2. The base without its weights, and the adapter to start from; raises where the recipe does not fit them
    base = read_base(recipe)
    PROGRESS.config = base.config.get_text_config().to_dict()
    PROGRESS.base_bytes = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
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
    start = begin(start, run, recipe, base, rows.counts(), initial_adapter, allowed, command_line)
    _say(*start.lines)
    if start.is_finished:
        _say(f"the run in {run.path} is finished: its adapter is {run.adapter}")
        return run.path
    dashboards = prepare_dashboards(recipe.logging, run, recipe.model_dump(mode="json"))

    # 5. 4-bit base and adapter (of selected experts with `lora.experts: auto`), compared with the recipe by the audit
    model, choice = _load(recipe, base, run, rows, initial_adapter, start.continues, parallelism)
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


def _processes(rank_timeout: int) -> Any:
    """accelerate's state of the processes of this run, which watch each other from now on."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch.accelerator import is_available

    # Without `cpu`, on a machine without an accelerator, each process would assume that it is the only one.
    on_cpu = not is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu, **group_arguments(start_timeout(rank_timeout)))
    watch_ranks(rank_timeout)
    return state


def _first_line(parallelism: Parallelism, state: Any) -> str:
    """What runs where, by the host names of all processes."""
    from socket import gethostname

    from accelerate.utils import gather_object
    from torch.cuda import get_device_name

    device = state.device.type
    name = f"{device} ({get_device_name(state.device)})" if device == "cuda" else device
    return first_line(parallelism, gather_object([gethostname()]), name)


def _train_and_save(setup: "TrainerSetup", trainer: Any) -> bool:
    """Train and write the adapter; False if a signal has ended the training before its last step."""
    from accelerate import PartialState

    from finetune.run import say_that_it_ends, write_waiting_lines

    run, state = setup.run, PartialState()
    stop.when_requested(partial(say_that_it_ends, run.path))
    with stop.deferred():  # until the checkpoint or the adapter is whole
        try:
            with phase("training"), ranks_training():
                finished: bool = trainer.run_from(setup.checkpoint)
            with phase("saving the adapter"):
                if state.is_main_process:
                    _draw(run)  # first: a run with an adapter is finished, and nothing of it is made again
                if finished:
                    _save(setup, trainer, state.is_main_process)
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
                "use --config_file accelerate_configs/ddp.yaml, or set CUDA_VISIBLE_DEVICES=0",
                got=f"{device_count()} GPUs",
            )
        )


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
    parallelism: Parallelism,
) -> "tuple[Any, ExpertChoice | None]":
    """Base model and adapter, sharded if the launcher says so; with `lora.experts: auto` also the chosen experts.

    They are measured on the rows, unless the adapter to start from, or the run that continues, has a choice already.
    """
    from accelerate import PartialState

    from finetune.model import adapt, load_base
    from finetune.moe.esft import choose_experts, read_choice
    from finetune.moe.sharding import shard_model, share_of_this_process

    auto = recipe.lora.experts == "auto"
    choice = None if initial_adapter is None else initial_adapter.choice
    if auto and choice is None and continues:
        choice = read_choice(run.experts)
    share = share_of_this_process(parallelism)
    with phase("loading the base"):
        model = load_base(base, recipe.model, share)
    if auto and choice is None and base.family.moe is not None:
        with phase("measuring experts"):
            if parallelism.is_sharded:
                shard_model(model.base_model, base.family, parallelism)
            choice = choose_experts(model, base.family.moe, rows.conversations, rows.conversation_collator, recipe)
        if parallelism.is_sharded:
            del model  # no adapter can be added to a model that is sharded
            with phase("loading the base"):
                model = load_base(base, recipe.model, share)
    if choice is not None and PartialState().is_main_process:
        choice.write(run.experts)
        print("\n".join(choice.lines()))
    adapted = adapt(model, base, recipe, choice, initial_adapter)
    if parallelism.is_sharded:
        shard_model(adapted, base.family, parallelism)
    return adapted, choice


def _audit(model: Any, base: "Base", recipe: Recipe, rows: "MethodRows", run: "RunFolder", is_main: bool) -> None:
    """Print and write the audit; raise RunError where the model in memory differs from the recipe."""
    from finetune.data import template_day
    from finetune.moe.audit import audit_model, audit_table, check_audit

    parts = audit_model(model, base.family)
    PROGRESS.parts, PROGRESS.audit_table = [part.as_dict() for part in parts.values()], audit_table(parts)
    if is_main:
        audit = {"parts": [part.as_dict() for part in parts.values()], "rows": rows.counts()}
        write_json(run.audit, {**audit, "template_day": template_day(base.tokenizer)})
        print(audit_table(parts))
        for split, stats in rows.stats.items():
            print(f"{split} rows: " + "\n".join(stats.lines()))
        for remark in rows.remarks:
            print(remark)
    check_audit(parts, recipe)


def _save(setup: "TrainerSetup", trainer: Any, is_main: bool) -> None:
    """Write the adapter in PEFT's format, with its card and `finetune.json`: the run is finished.

    Every process gathers the parts of a sharded adapter, the main one writes it.
    """
    from finetune.checkpoint import new_folder, sync_files, write_sums
    from finetune.methods.checkpointing import adapter_facts, tensor_bytes, write_adapter
    from finetune.model import snapshot_adapter

    run = setup.run
    adapter = snapshot_adapter(trainer.accelerator.unwrap_model(trainer.model), setup.base.family)
    if not is_main:
        return
    facts = adapter_facts(setup)
    try:
        with new_folder(run.adapter, tensor_bytes(adapter.factors)) as folder:
            write_adapter(folder, setup, adapter, facts)
            write_sums(folder)
            sync_files(folder)
    except DiskError as error:
        raise DiskError([_with_what_is_saved(problem, run) for problem in error.problems]) from error
    print(f"adapter: {run.adapter}")


def _with_what_is_saved(problem: Problem, run: "RunFolder") -> Problem:
    """The reason why the adapter is not saved, with what the same command will do once it is gone."""
    from finetune.run import newest_step

    step = newest_step(run.path)
    then = "starts anew: no checkpoint was saved" if step is None else f"goes on from checkpoint-{step}, which is saved"
    return replace(problem, do=f"{problem.do}; the same command then {then}")


def _draw(run: "RunFolder") -> None:
    """The curves of what was done. A picture that fails is said, and does not end a run."""
    from finetune.run import draw_loss_curve, draw_router_load

    try:
        draw_loss_curve(run.metrics, run.loss_curve)
        draw_router_load(run.router_load, run.router_load_picture)
    except Exception as error:
        print(f"{run.path}: a picture could not be drawn ({type(error).__name__}: {error}); the run is not affected")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m finetune.train RECIPE [key.path=value ...]`: what `accelerate launch` starts on every process."""
    wait_passively()
    no_telemetry()
    hush()
    print_plainly(may_be_lost=True)  # the disk of the log may be full, and the run must not end for it
    parser = argparse.ArgumentParser(prog="finetune.train", description="Train from a recipe.")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", help="settings to change: key.path=value")
    parser.add_argument("--allow-change", action="append", default=[], help="as of `finetune train`")
    args = parser.parse_args(argv)
    try:
        stop.install()
        if (launcher := launcher_process()) is not None:
            stop.watch(launcher, _SECONDS_WITHOUT_LAUNCHER)
        return _main(args.recipe, args.overrides, args.allow_change)
    except Interrupted:
        return _interrupted()


def _main(recipe: Path, overrides: Sequence[str], allowed: Sequence[str]) -> int:
    try:
        train(load_recipe(recipe, overrides), [sys.executable, *sys.argv], allowed)
        finish_ranks()
    except Exception as error:
        if stop.requested is not None and not stop.began:
            return _interrupted()  # another process, which this one waited for, was signalled as well, and has left
        return end_run(error)
    return stop.exit_code


def _interrupted() -> int:
    """The exit code of a signal that came before the training, or once everything was saved."""
    if stop.began or stop.requested is None:
        return 0
    if (lost := lost_rank()) is not None:
        if lost:
            print(lost, file=sys.stderr)
        return 1  # the signal is the launcher's, which ends the others
    finish_ranks()
    if rank() == 0:
        print(stop.line(), file=sys.stderr)
    return stop.early_exit_code


if __name__ == "__main__":
    sys.exit(stop.finish(main()))
