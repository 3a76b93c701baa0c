"""Train from a recipe.

    accelerate launch -m finetune.train recipes/quickstart/sft-qlora.yaml training.max_steps=5

The recipe is validated before torch is imported: packages that import torch are imported inside the functions.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.environment import hush, wait_passively
from finetune.errors import Problem, RecipeError, RunError
from finetune.files import write_json, write_text
from finetune.launcher import check_launcher, rank
from finetune.progress import phase
from finetune.recipe import Recipe, dump_recipe, load_recipe

if TYPE_CHECKING:
    from finetune.adapters.initial import InitialAdapter
    from finetune.base import Base
    from finetune.methods.common import MethodRows, TrainerSetup
    from finetune.moe.esft import ExpertChoice
    from finetune.run import RunFolder


_SECONDS_TO_SAY_IT_ONCE = 10


def train(recipe: Recipe, command_line: Sequence[str]) -> Path:
    """Run the recipe; returns the run folder."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch.accelerator import is_available
    from transformers import set_seed

    from finetune.base import check_resumed_base, read_base
    from finetune.methods import method_of
    from finetune.methods.common import TrainerSetup
    from finetune.methods.trainer_checks import check_schedule, check_trainer
    from finetune.run import prepare_dashboards
    from finetune.run.ranks import finish_ranks, ranks_training, start_timeout, watch_ranks

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

    # 1. The run folder and the dashboards
    run = _open_run(recipe, state)
    dashboards = prepare_dashboards(recipe.logging, run, recipe.model_dump(mode="json"))
    method = method_of(recipe.method.kind)

    # 2. The base without its weights, and the adapter to start from; raises where the recipe does not fit them
    base = read_base(recipe)
    if recipe.training.resume_from_checkpoint:
        check_resumed_base(base, run)
    initial_adapter = _initial_adapter(recipe, base)

    # 3. Rows -> token ids and labels
    _set_template_day(base, run, recipe.training.resume_from_checkpoint)
    with phase("preparing rows"):
        rows = method.prepare_rows(recipe, base)
    _check_same_rows(recipe, rows, run)
    for remark in check_schedule(recipe, recipe.training.optimizer_steps(len(rows.train)), state.num_processes):
        if state.is_main_process:
            print(remark)

    # 4. 4-bit base and adapter (of selected experts with `lora.experts: auto`), compared with the recipe by the audit
    model, choice = _load(recipe, base, run, rows, initial_adapter)
    _audit(model, base, recipe, rows, run, state.is_main_process)
    if state.is_main_process:
        _write_recipe_and_provenance(run, recipe, base, command_line)

    # 5. The method's trainer
    setup = TrainerSetup(recipe, run, base, model, rows, initial_adapter, dashboards)
    trainer = method.make_trainer(setup)

    # 6. Train, from the newest checkpoint if the recipe says so, with an evaluation after the last step; save
    with phase("training"), ranks_training():
        trainer.run_from(run.newest_checkpoint() if recipe.training.resume_from_checkpoint else None)
    with phase("saving the adapter"):
        if state.is_main_process:
            _save(setup, trainer, choice)
        state.wait_for_everyone()
    finish_ranks()
    for callback in dashboards.callbacks:
        callback.finish()
    return run.path


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


def _open_run(recipe: Recipe, state: Any) -> "RunFolder":
    """The run folder, new or continued. Raises RunError where it belongs to a run of another recipe."""
    from finetune.run import RunFolder, check_same_recipe

    run = RunFolder(Path(recipe.output_dir))
    resume = recipe.training.resume_from_checkpoint
    if state.is_main_process and (kept := run.create(resume=resume)):
        print(f"the earlier run in {run.path} is kept as {kept}")
    state.wait_for_everyone()
    if resume:
        check_same_recipe(run, recipe)
    return run


def _initial_adapter(recipe: Recipe, base: "Base") -> "InitialAdapter | None":
    """The adapter to start from. Raises WeightsError where base, quantization, template or `lora` section differ."""
    from finetune.adapters.initial import check_same_setup, read_initial_adapter

    if recipe.model.adapter is None:
        return None
    initial_adapter = read_initial_adapter(Path(recipe.model.adapter))
    check_same_setup(initial_adapter, recipe, base.provenance, base.tokenizer.chat_template)
    return initial_adapter


def _set_template_day(base: "Base", run: "RunFolder", resume: bool) -> None:
    """A template that writes a date writes that of the run's first start, on every process and after every resume."""
    from accelerate.utils import broadcast_object_list

    from finetune.data import set_template_day, template_day
    from finetune.run import recorded_template_day

    days = [(recorded_template_day(run) if resume else None) or template_day(base.tokenizer)]
    set_template_day(base.tokenizer, broadcast_object_list(days)[0])


def _check_same_rows(recipe: Recipe, rows: "MethodRows", run: "RunFolder") -> None:
    """A resumed run must use the same rows as the original run."""
    from finetune.run import check_same_rows

    if recipe.training.resume_from_checkpoint:
        check_same_rows(run, rows.counts())


def _load(
    recipe: Recipe, base: "Base", run: "RunFolder", rows: "MethodRows", initial_adapter: "InitialAdapter | None"
) -> "tuple[Any, ExpertChoice | None]":
    """Base model and adapter; with `lora.experts: auto` also the chosen experts.

    They are measured on the rows, unless the adapter to start from, or the run that is resumed, has a choice already.
    """
    from accelerate import PartialState

    from finetune.model import adapt, load_base
    from finetune.moe.esft import choose_experts, read_choice

    auto = recipe.lora.experts == "auto"
    choice = None if initial_adapter is None else initial_adapter.choice
    if auto and choice is None and recipe.training.resume_from_checkpoint:
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


def _save(setup: "TrainerSetup", trainer: Any, choice: "ExpertChoice | None") -> None:
    """Write the adapter in PEFT's format, with its card and `finetune.json`, and draw the curves."""
    from finetune.cards import adapter_card
    from finetune.checkpoint import new_folder, write_sums
    from finetune.data import template_args, template_day
    from finetune.data.tokenizer import end_ids
    from finetune.generation_config import FILE, generation_settings
    from finetune.model import save_adapter
    from finetune.run import draw_loss_curve, draw_router_load, training_facts

    run, base, tokenizer = setup.run, setup.base, setup.base.tokenizer
    settings = template_day(tokenizer), template_args(tokenizer)
    facts = training_facts(run, setup.rows.counts(), tokenizer.chat_template, *settings)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with new_folder(run.adapter) as folder:
        record = save_adapter(model, folder, setup.recipe, base, choice, setup.initial_adapter, facts)
        tokenizer.save_pretrained(folder)
        ends = end_ids(tokenizer, (source.response_end for source in setup.recipe.data.sources("train")))
        write_json(folder / FILE, generation_settings(base.folder, ends, tokenizer.pad_token_id))
        write_text(folder / "README.md", adapter_card(record.as_dict()))
        write_sums(folder)
    draw_loss_curve(run.metrics, run.loss_curve)
    draw_router_load(run.router_load, run.router_load_picture)
    print(f"adapter: {run.adapter}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m finetune.train RECIPE [key.path=value ...]`: what `accelerate launch` starts on every process."""
    wait_passively()
    hush()
    parser = argparse.ArgumentParser(prog="finetune.train", description="Train from a recipe.")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", help="settings to change: key.path=value")
    args = parser.parse_args(argv)
    try:
        train(load_recipe(args.recipe, args.overrides), [sys.executable, *sys.argv])
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
