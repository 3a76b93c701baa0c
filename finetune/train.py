"""Floor 6: recipe in, run out.

    accelerate launch -m finetune.train recipes/quickstart/sft-qlora.yaml training.max_steps=5

The recipe is validated before torch is imported: the heavy rooms are imported inside `train`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import FinetuneError, Problem, RunError, as_expected
from finetune.files import write_json, write_text
from finetune.quiet import hush
from finetune.recipe import Recipe, dump_recipe, load_recipe
from finetune.threads import wait_passively

if TYPE_CHECKING:
    from finetune.methods.rows import MethodRows
    from finetune.moe.earlier import EarlierAdapter
    from finetune.moe.esft.choice import ExpertChoice
    from finetune.moe.families import Family
    from finetune.run import RunFolder


def train(recipe: Recipe, command_line: Sequence[str]) -> Path:
    """Run the recipe; returns the run folder."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch.accelerator import is_available
    from transformers import set_seed

    from finetune.methods import method_of
    from finetune.methods.common import accumulation_steps
    from finetune.methods.setup import TrainerSetup
    from finetune.model import architecture_config, checkpoint_family, recipe_tokenizer, resolve_checkpoint
    from finetune.run import prepare_dashboards

    # Without `cpu` several processes on a machine without an accelerator would each think to be alone.
    state = PartialState(cpu=not is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))
    _refuse_data_parallel(state)
    set_seed(recipe.seed)

    # 1. Where the run goes, and what it reports to
    run = _open_run(recipe, state)
    dashboards = prepare_dashboards(recipe.logging, run)
    method = method_of(recipe.method.kind)
    accumulation_steps(recipe, state.num_processes)  # a batch that cannot be cut is refused before anything is loaded

    # 2. What architecture it is, and what the run goes on from; refuses a recipe that does not fit
    checkpoint = resolve_checkpoint(recipe.model)
    family = checkpoint_family(checkpoint, recipe)
    tokenizer, new_tokens = recipe_tokenizer(checkpoint, recipe)
    base = _base_provenance(checkpoint, recipe)
    earlier = _earlier_adapter(recipe, base, tokenizer)

    # 3. Rows -> token ids and the supervised mask
    rows = method.prepare_rows(recipe, tokenizer, family, architecture_config(checkpoint))
    _refuse_changed_rows(recipe, rows, run)

    # 4. 4-bit base and adapter (of the experts that matter for these rows), counted and held against the recipe
    model, choice = _load(checkpoint, recipe, family, run, rows, new_tokens, earlier)
    _audit(model, family, recipe, rows, run, state.is_main_process)
    if state.is_main_process:
        _write_provenance(run, recipe, base, command_line)

    # 5. TRL's trainer of the method, plus the router term
    setup = TrainerSetup(recipe, run, family, model, tokenizer, rows, earlier, base, dashboards)
    trainer = method.make_trainer(setup)

    # 6. Train, from the newest checkpoint if the recipe says so, with an evaluation after the last step; save
    trainer.run_from(run.newest_checkpoint() if recipe.training.resume_from_checkpoint else None)
    if state.is_main_process:
        _save(run, trainer, tokenizer, recipe, base, choice, earlier, rows)
    state.wait_for_everyone()
    return run.path


def _refuse_data_parallel(state: Any) -> None:
    """One process that sees several GPUs would make the trainer fall back to `nn.DataParallel`."""
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
    """The run folder, made or continued; refused where another run lies there."""
    from finetune.run import RunFolder, refuse_other_recipe

    run = RunFolder(Path(recipe.output_dir))
    resume = recipe.training.resume_from_checkpoint
    if state.is_main_process and (kept := run.create(resume=resume)):
        print(f"the earlier run in {run.path} is kept as {kept}")
    state.wait_for_everyone()
    if resume:
        refuse_other_recipe(run, recipe)
    return run


def _earlier_adapter(recipe: Recipe, base: dict[str, Any], tokenizer: Any) -> "EarlierAdapter | None":
    """The adapter that the run goes on from, refused where it was made on something else."""
    from finetune.moe.earlier import read_earlier, refuse_unfit

    if recipe.model.adapter is None:
        return None
    earlier = read_earlier(Path(recipe.model.adapter))
    refuse_unfit(earlier, recipe, base["fingerprint"], tokenizer.chat_template)
    return earlier


def _refuse_changed_rows(recipe: Recipe, rows: "MethodRows", run: "RunFolder") -> None:
    """A run is continued on the rows that it began with."""
    from finetune.run import refuse_other_rows

    if recipe.training.resume_from_checkpoint:
        refuse_other_rows(run, {split: each.as_dict() for split, each in rows.stats.items()})


def _load(
    checkpoint: Path,
    recipe: Recipe,
    family: "Family",
    run: "RunFolder",
    rows: "MethodRows",
    new_tokens: Sequence[int],
    earlier: "EarlierAdapter | None",
) -> "tuple[Any, ExpertChoice | None]":
    """Base and adapter. With `lora.experts: auto` of the experts that are measured on the rows; a run that goes on
    from an adapter, or is resumed, never measures again, but takes the choice that was written."""
    from accelerate import PartialState

    from finetune.model import adapt, load_base
    from finetune.moe.esft.choice import read_choice
    from finetune.moe.esft.measure import choose_experts

    auto = recipe.lora.experts == "auto"
    choice = None if earlier is None else earlier.choice
    if auto and choice is None and recipe.training.resume_from_checkpoint:
        choice = read_choice(run.experts)
    base = load_base(checkpoint, recipe.model, new_tokens)
    if auto and choice is None and family.moe is not None:
        choice = choose_experts(base, family.moe, rows.conversations, rows.conversation_collator, recipe)
    if choice is not None and PartialState().is_main_process:
        choice.write(run.experts)
        print("\n".join(choice.lines()))
    return adapt(base, recipe, choice, new_tokens, earlier), choice


def _audit(model: Any, family: "Family", recipe: Recipe, rows: "MethodRows", run: "RunFolder", is_main: bool) -> None:
    """Print and write the audit; stop where the loaded model is not what the recipe says."""
    from finetune.moe.audit import audit_model, audit_table, differences

    parts = audit_model(model, family)
    if is_main:
        counts = {split: stats.as_dict() for split, stats in rows.stats.items()}
        write_json(run.audit, {"parts": [part.as_dict() for part in parts.values()], "rows": counts})
        print(audit_table(parts))
        for split, stats in rows.stats.items():
            print(f"{split} rows: " + "\n".join(stats.lines()))
        for remark in rows.remarks:
            print(remark)
    base = recipe.model
    problems = differences(parts, recipe.lora, base.load_in_4bit, base.dtype, len(base.added_tokens))
    if problems:
        raise RunError(problems)


def _base_provenance(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    """Name and fingerprint of the base, which one process takes for all; of a merged one also what it was made from."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from finetune.adapters.lineage import made_from
    from finetune.checkpoint import fingerprint

    taken = [fingerprint(checkpoint) if PartialState().is_main_process else ""]
    found = {"name_or_path": recipe.model.name_or_path, "fingerprint": broadcast_object_list(taken)[0]}
    source = made_from(checkpoint, found["fingerprint"])
    return found if source is None else {**found, "made_from": source}


def _write_provenance(run: "RunFolder", recipe: Recipe, base: dict[str, Any], command_line: Sequence[str]) -> None:
    from finetune.run import collect_provenance

    write_text(run.recipe, dump_recipe(recipe))
    write_json(run.provenance, collect_provenance(base, recipe.seed, list(command_line)))


def _save(
    run: "RunFolder",
    trainer: Any,
    tokenizer: Any,
    recipe: Recipe,
    base: dict[str, Any],
    choice: "ExpertChoice | None",
    earlier: "EarlierAdapter | None",
    rows: "MethodRows",
) -> None:
    """The adapter, in stock PEFT's format, whole or not at all; what PEFT cannot say stands in `finetune.json`."""
    from finetune.cards import adapter_card, read_record
    from finetune.checkpoint import new_folder, write_sums
    from finetune.model import save_adapter
    from finetune.run import draw_loss_curve, draw_router_load, training_facts

    counts = {split: stats.as_dict() for split, stats in rows.stats.items()}
    facts = training_facts(run, counts, tokenizer.chat_template)
    with new_folder(run.adapter) as folder:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder, recipe, base, choice, earlier, facts)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", adapter_card(read_record(folder)))
        write_sums(folder)
    draw_loss_curve(run.metrics, run.loss_curve)
    draw_router_load(run.router_load, run.router_load_picture)
    print(f"adapter: {run.adapter}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m finetune.train RECIPE [key.path=value ...]`: what `accelerate launch` starts on every process."""
    wait_passively()
    hush()
    parser = argparse.ArgumentParser(prog="finetune.train", description="Train as a recipe says.")
    parser.add_argument("recipe", type=Path, help="path of a YAML recipe")
    parser.add_argument("overrides", nargs="*", help="settings to change: key.path=value")
    args = parser.parse_args(argv)
    try:
        train(load_recipe(args.recipe, args.overrides), [sys.executable, *sys.argv])
    except (FinetuneError, OSError) as error:
        print(expected := as_expected(error), file=sys.stderr)
        return expected.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
