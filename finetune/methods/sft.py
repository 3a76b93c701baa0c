"""SFT: TRL's trainer on our rows, with the router term and exact figures."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from finetune.methods.common import common_arguments, refuse_other_world
from finetune.methods.steps import ExactSteps
from finetune.recipe import Recipe


def sft_config(recipe: Recipe, output_dir: Path, dashboards: Mapping[str, Any], num_processes: int) -> SFTConfig:
    """TRL's arguments for a recipe; `dashboards` as in `common_arguments`."""
    own = {"packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    config = SFTConfig(**common_arguments(recipe, output_dir, dashboards, num_processes), **own)
    refuse_other_world(config, num_processes)
    return config


def real_tokens(inputs: Mapping[str, Any]) -> torch.Tensor:
    """1 for each position that is a token and 0 for padding, `[T]`. A packed row has no padding."""
    mask = inputs.get("attention_mask")
    return (torch.ones_like(inputs["input_ids"]) if mask is None else mask).reshape(-1)


class MoeSftTrainer(ExactSteps, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on rows tokenised by `finetune.data`.

    Adds to TRL what `ExactSteps` adds; cross entropy and balance term are logged apart, and the evaluation loss is the
    mean over all supervised tokens.
    """

    sums = ("ce", "tokens")  # in training the micro-batches' shares of a step's mean, in evaluation sums over tokens

    def weights(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """1 for each token, 0 for padding."""
        return real_tokens(inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy of the micro-batch, normalised by the step's supervised tokens, plus its share of the term."""
        inputs.pop("rows")
        if not self.model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        term = self.router_term
        with nullcontext() if term is None else term.capture() as record:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.count(ce=loss, tokens=loss.new_zeros(()))
        return self.with_router_term(loss, record, inputs)

    def _evaluation_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Cross entropy alone; also summed up, so that the reported value weighs every supervised token the same."""
        inputs["labels"][self.first_repeated(len(inputs["labels"])) :] = -100
        result = super().compute_loss(model, inputs, return_outputs=return_outputs)
        loss = result[0] if return_outputs else result
        tokens = inputs["labels"][..., 1:].ne(-100).sum()
        self.count(ce=loss.double() * tokens, tokens=tokens)
        return result

    def figures(self, sums: dict[str, float], steps: int) -> dict[str, float]:
        """The mean cross entropy of a step."""
        return {"ce_loss": sums["ce"] / self.accelerator.num_processes / steps}

    def evaluation_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """The mean cross entropy of a supervised token."""
        return {"loss": sums["ce"] / max(sums["tokens"], 1.0)}
