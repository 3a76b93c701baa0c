"""SFT from a recipe: its rows, and TRL's trainer with the router term and exact figures."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import PartialState
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from finetune.base import Base
from finetune.data import Collator, prepare
from finetune.data.tokens.collators import needs_one_row
from finetune.data.tokens.reasoning_remarks import reasoning_remarks
from finetune.methods.arguments import sft_config
from finetune.methods.common import MethodRows, TrainerSetup
from finetune.methods.run_trainer import RunTrainer
from finetune.recipe import Recipe


class MoeSftTrainer(RunTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on rows tokenised by `finetune.data`, with a loss and figures of its own.

    TRL's `compute_loss` reads five values from the device in each micro-batch, for figures that are means of
    micro-batch means. Here everything is a sum over tokens, and the evaluation loss is the mean over all of them.
    """

    # In training `ce` is the sum of the micro-batches' shares of a step's mean, in evaluation the sum over tokens.
    sums = ("ce", "tokens", "top1", "entropy")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy of the micro-batch, normalised by the step's supervised tokens, plus its share of the term."""
        if not self.model.training:
            return self._evaluation_loss(model, inputs)
        term = self.router_term
        with nullcontext() if term is None else term.capture() as record:
            scores = _scores(model, inputs)
        loss = -scores.log_probs.sum() / num_items_in_batch.clamp(min=1)
        self._count(scores, loss)
        return self.with_router_term(loss * self.accelerator.num_processes, record, inputs)

    def _evaluation_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross entropy alone; also summed up, so that the reported value weighs every supervised token the same."""
        scores = _scores(model, inputs)
        ce = -scores.log_probs.double().sum()
        self._count(scores, ce)
        loss: torch.Tensor = ce / scores.label_mask.sum().clamp(min=1)
        return loss

    def _count(self, scores: FusedCausalLMOutput, ce: torch.Tensor) -> None:
        tokens, top1 = scores.label_mask.sum(), scores.is_top1.sum()
        self.count(ce=ce, tokens=tokens, top1=top1, entropy=scores.entropy.sum())

    def figures(self, sums: dict[str, float], steps: int) -> dict[str, float]:
        """The mean cross entropy of a step, and means over the supervised tokens of all steps."""
        return {"ce_loss": sums["ce"] / steps, **_token_figures(sums), "num_tokens": self.num_tokens}

    def evaluation_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the supervised tokens."""
        return {"loss": sums["ce"] / max(sums["tokens"], 1.0), **_token_figures(sums)}


def _scores(model: Any, inputs: Mapping[str, Any]) -> FusedCausalLMOutput:
    """Log-probability, entropy and top-1 hit of each label from TRL's fused head, 0 where a label is -100."""
    arguments = {name: value for name, value in inputs.items() if name not in ("rows", "weight")}
    scores: FusedCausalLMOutput = model(**arguments, use_cache=False, fused_lm_head=True)
    return scores


def _token_figures(sums: dict[str, float]) -> dict[str, float]:
    """TRL's names, as means over supervised tokens."""
    tokens = max(sums["tokens"], 1.0)
    return {"mean_token_accuracy": sums["top1"] / tokens, "entropy": sums["entropy"] / tokens}


def prepare_rows(recipe: Recipe, base: Base) -> MethodRows:
    """Training and held-out rows. One process of a machine prepares them, the others read its cache."""
    data, tokenizer = recipe.data, base.tokenizer
    with PartialState().local_main_process_first():
        splits = {
            name: prepare(data.sources(name), tokenizer, data, recipe.seed)
            for name in ("train", "eval")
            if data.sources(name)
        }
    stats = {name: split.stats for name, split in splits.items()}
    collator = Collator(tokenizer, in_one_row=needs_one_row(recipe.model.attn_implementation))
    return MethodRows(
        train=splits["train"].dataset,
        eval=splits["eval"].dataset if "eval" in splits else None,
        collator=collator,
        stats=stats,
        conversations=splits["train"].dataset,
        conversation_collator=collator,
        remarks=reasoning_remarks(tokenizer, data, stats),
    )


def make_trainer(setup: TrainerSetup) -> MoeSftTrainer:
    """The trainer for this recipe."""
    return MoeSftTrainer(
        args=sft_config(setup.recipe, setup.run.path, setup.dashboards.trainer_args, PartialState().num_processes),
        **setup.arguments(),
    )
