"""SFT from a recipe: its rows and its trainer."""

from accelerate import PartialState

from finetune.base import Base
from finetune.data import Collator, prepare
from finetune.methods.rows import MethodRows
from finetune.methods.setup import TrainerSetup
from finetune.methods.sft import MoeSftTrainer, sft_config
from finetune.recipe import Recipe


def prepare_rows(recipe: Recipe, base: Base) -> MethodRows:
    """Training and held-out rows. One process of a machine prepares them, the others read its cache."""
    data, tokenizer = recipe.data, base.tokenizer
    with PartialState().local_main_process_first():
        splits = {
            name: prepare(data.sources(name), tokenizer, data, recipe.seed)
            for name in ("train", "eval")
            if data.sources(name)
        }
    collator = Collator(tokenizer)
    return MethodRows(
        train=splits["train"].dataset,
        eval=splits["eval"].dataset if "eval" in splits else None,
        collator=collator,
        stats={name: split.stats for name, split in splits.items()},
        conversations=splits["train"].dataset,
        conversation_collator=collator,
    )


def make_trainer(setup: TrainerSetup) -> MoeSftTrainer:
    """The trainer for this recipe."""
    return MoeSftTrainer(
        args=sft_config(setup.recipe, setup.run.path, setup.dashboards.trainer_args, PartialState().num_processes),
        **setup.arguments(),
    )
