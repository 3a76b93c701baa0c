"""DPO from a recipe: its pairs, their layout, its reference and its trainer.

`check_start` verifies before the first step that the policy equals its reference, so that every reward is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm

from finetune.base import Base
from finetune.data import Collator, PairMixture, PairTable, prepare_pair_mixture
from finetune.data.tokens.collators import PairCollator, PairLayout
from finetune.data.tokens.global_batches import equal_share
from finetune.data.tokens.reasoning_remarks import reasoning_remarks
from finetune.errors import Problem, RunError
from finetune.methods.arguments import dpo_config
from finetune.methods.common import MethodRows, TrainerSetup
from finetune.methods.dpo_trainer import MoeDpoTrainer
from finetune.methods.pairs import pair_layout, score_pairs
from finetune.methods.reference import Reference, ReferenceStore, compute_missing, digest_of
from finetune.progress import phase
from finetune.recipe import DpoSettings, Recipe

TOLERANCE = {torch.float32: 1e-4}
LOW_PRECISION = 1e-2


def check_start(trainer: MoeDpoTrainer, rows: Sequence[Sequence[int]]) -> None:
    """Raise RunError if the reward margin of a pair in these training rows is not 0; the message names the cause.

    The tolerance is 1e-4, and 1e-2 where the model computes in 16 bits.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    inputs = trainer.batch_of("train", rows)
    training = model.training
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        policy_2B = trainer.answer_logps(score_pairs(model, inputs, trainer.attention), inputs)
        live_2B = trainer.reference_logps(inputs)
    model.train(training)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    used_2B = live_2B if trainer.live else torch.cat([inputs[name] for name in names])
    tolerance = TOLERANCE.get(model.dtype, LOW_PRECISION)
    margin_B = _margin(trainer.method.beta * (policy_2B - used_2B))
    worst = int(margin_B.abs().argmax())
    if margin_B.abs()[worst] <= tolerance:
        return
    if _margin(trainer.method.beta * (policy_2B - live_2B)).abs()[worst] > tolerance:
        differs = "the adapter: the one that is trained does not start as the reference's"
    else:
        differs = "the base: its log-probabilities are not those that were kept, of the same rows and adapter"
        if tolerance == LOW_PRECISION:
            differs += " (in 16 bits it is enough that they were computed in other micro-batches)"
    raise RunError(
        Problem(
            inputs["rows"][worst],
            f"before the first step this pair's reward margin is not 0 within {tolerance:g}; what differs is {differs}",
            "remove the folder reference/ of the run so that it is computed again; if that does not help, report it",
            got=f"{margin_B[worst].item():.3g}",
        )
    )


def _margin(rewards_2B: torch.Tensor) -> torch.Tensor:
    chosen_B, rejected_B = rewards_2B.chunk(2)
    return chosen_B - rejected_B


@dataclass(frozen=True)
class PairRows(MethodRows):
    """Also the pairs of each split."""

    tables: dict[str, PairTable] | None = None


def prepare_rows(recipe: Recipe, base: Base) -> PairRows:
    """Pairs to train on and held-out ones, and the layout in which they are computed."""
    data, tokenizer = recipe.data, base.tokenizer
    with PartialState().local_main_process_first():
        mixtures = {
            name: prepare_pair_mixture(data.sources(name), tokenizer, data, recipe.seed)
            for name in ("train", "eval")
            if data.sources(name)
        }
    layout, remark = pair_layout(recipe, base.family, base.config, mixtures["train"])
    datasets = {name: _dataset(name, mixture, recipe, layout) for name, mixture in mixtures.items()}
    stats = {name: mixture.stats(len(datasets[name])) for name, mixture in mixtures.items()}
    tables = {name: mixture.table for name, mixture in mixtures.items()}
    return PairRows(
        train=datasets["train"],
        eval=datasets.get("eval"),
        # GPU kernels take a mask of who sees whom three times as fast where its rows are a multiple of 8.
        collator=PairCollator(tokenizer, tables, layout, pad_to_multiple_of=8 if _on_gpu() else 1),
        stats=stats,
        conversations=_Chosen(tables["train"]),
        conversation_collator=Collator(tokenizer),
        remarks=[f"prompts: {remark}", *reasoning_remarks(tokenizer, data, stats)],
        tables=tables,
    )


def _dataset(name: str, mixture: PairMixture, recipe: Recipe, layout: PairLayout) -> Dataset:
    dataset = mixture.dataset(recipe.data, share_prompts=layout == "shared")
    return dataset.add_column("split", [name] * len(dataset))


def _on_gpu() -> bool:
    return bool(PartialState().device.type == "cuda")


class _Chosen:
    """The prompts with their chosen answers, as rows for SFT's collator."""

    def __init__(self, table: PairTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self._table[index]
        labels = np.concatenate([np.full(len(pair.prompt_ids), -100, np.int32), pair.chosen_labels])
        return {"input_ids": np.concatenate([pair.prompt_ids, pair.chosen_ids]), "labels": labels, "row": pair.row}


def make_trainer(setup: TrainerSetup) -> MoeDpoTrainer:
    """The trainer; unless the reference is live, its missing log-probabilities are computed here."""
    recipe, rows, method = setup.recipe, setup.rows, setup.recipe.method
    assert isinstance(method, DpoSettings)
    assert isinstance(rows, PairRows)
    assert rows.tables is not None
    bias = None if setup.router_term is None else setup.router_term.bias
    fresh = setup.initial_adapter is None and not recipe.model.added_tokens
    reference = Reference(setup.model, fresh) if bias is None else Reference(setup.model, fresh, bias.all_as_base)
    trainer = MoeDpoTrainer(
        args=dpo_config(recipe, setup.run.path, setup.dashboards.trainer_args, PartialState().num_processes),
        method=method,
        reference=reference,
        attention=recipe.model.attn_implementation,
        **setup.arguments(),
    )
    if method.reference == "precomputed":
        store = ReferenceStore(setup.run.reference, _made_from(setup, method, rows.tables))
        with phase("computing the reference"):
            _precompute(trainer, store, rows)
    if setup.checkpoint is None:
        batches = _batches(trainer, rows.train["pairs"])
        check_start(trainer, batches[PartialState().process_index % len(batches)])
    return trainer


def _batches(trainer: MoeDpoTrainer, rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """The batches of rows in which the reference is computed before the first step.

    As many rows as in training: rounding depends on what is computed together.
    """
    size = trainer.args.per_device_train_batch_size
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _made_from(setup: TrainerSetup, method: DpoSettings, tables: dict[str, PairTable]) -> dict[str, str | None]:
    """Everything that the reference's log-probabilities depend on."""
    model = setup.recipe.model
    return {
        "base": setup.base.provenance.fingerprint,
        "adapter": None if setup.initial_adapter is None else setup.initial_adapter.digest(),
        "quantisation": f"{'nf4' if model.load_in_4bit else None}, {model.dtype}",
        "template": setup.base.tokenizer.chat_template,
        **{f"{name} data": digest_of(table) for name, table in tables.items()},
        "ld_alpha": str(method.ld_alpha),
    }


def _precompute(trainer: MoeDpoTrainer, store: ReferenceStore, rows: PairRows) -> None:
    """Compute the missing log-probabilities on all processes, and pass all of them to the collator."""
    state = PartialState()
    assert rows.tables is not None
    store.open(state.is_main_process)
    state.wait_for_everyone()
    # The main process says what is missing: all make the same number of forwards, and none writes before it has looked.
    tables = rows.tables if state.is_main_process else {}
    (missing,) = broadcast_object_list([{split: set(store.missing(split, tables[split])) for split in tables}])
    for split, indices in missing.items():
        # The batches are those of the whole split, so that a value does not depend on where a killed run stopped.
        batches = _batches(trainer, (rows.train if split == "train" else rows.eval)["pairs"])
        batches = [batch for batch in batches if not indices.isdisjoint(chain(*batch))]
        mine = equal_share(batches, state.process_index, state.num_processes)
        label = f"Reference of {len(indices):,} {split} pairs"
        shown = tqdm(mine, desc=label, unit="batch", disable=not (state.is_main_process and mine))
        logps = partial(pair_logps, trainer, split)
        compute_missing(store, split, rows.tables[split], indices, shown, state.process_index, logps)
    state.wait_for_everyone()
    rows.collator.reference = {split: store.read(split, table) for split, table in rows.tables.items()}


def pair_logps(trainer: MoeDpoTrainer, split: str, rows: Sequence[Sequence[int]]) -> Any:
    """The reference's log-probabilities `[B, 2]` of the chosen and the rejected answers of some rows of pairs."""
    inputs = trainer.batch_of(split, rows)
    with trainer.compute_loss_context_manager():
        return trainer.reference_logps(inputs).view(2, -1).T
