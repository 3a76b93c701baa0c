"""New tokens in the model: rows of the embedding, and of a head with a weight of its own; only they are trained.

PEFT trains the rows (`trainable_token_indices`): it keeps them apart and puts them in the places of the base's, so that
a saved adapter holds them whole, whatever the base's rows started as.
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.errors import Problem, RecipeError, WeightsError


def refuse_outside(rows: int, highest_id: int, added: int, where: str) -> None:
    """Raise WeightsError where the tokenizer has ids without a row; `added`: how many of them the recipe adds.

    `rows`: of the checkpoint's embedding; `highest_id`: of the tokenizer with the added tokens.
    """
    if highest_id - added >= rows:
        raise WeightsError(
            Problem(
                where,
                f"the tokenizer has tokens outside the model's embedding of {rows} rows",
                "use the checkpoint's own tokenizer, and name the new tokens in model.added_tokens",
                got=f"id {highest_id - added}",
            )
        )


def grow_vocabulary(model: Any, tokens: Sequence[int]) -> None:
    """Give new ids (ascending, above all known ones) their rows, which start as the mean of the rows of known tokens.

    A checkpoint may have spare rows behind its vocabulary: they hold whatever was there when it was trained, so they
    are set as well. The matrices are made longer only where they have no row for an id.
    """
    if not tokens:
        return
    _refuse_head(model)
    if tokens[-1] >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for module in vocabulary_modules(model).values():
            # What transformers draws around the mean has a deviation of 3e-5 of the rows' own: bfloat16 has none of it.
            module.weight[list(tokens)] = module.weight[: tokens[0]].mean(0, dtype=torch.float32).to(module.weight)


def vocabulary_modules(model: Any) -> dict[str, Any]:
    """Embedding and, where it has a weight of its own, head of a base model, by path."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {name: module for name, module in model.named_modules() if any(module is each for each in wanted)}


def complete_head(model: Any) -> None:
    """Give PEFT's wrapper of the head the attribute `bias` of a linear layer, for which TRL's fused loss asks it."""
    model.get_output_embeddings().bias = None


def _refuse_head(model: Any) -> None:
    """PEFT computes the head of new tokens as a plain product."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        what = f"the head of {model.config.model_type} has a bias, or is no linear layer: its rows cannot be trained"
        raise RecipeError(Problem("model.added_tokens", what, "take the added tokens out", got=type(head).__name__))
