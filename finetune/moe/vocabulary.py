"""New tokens in the model: their rows of the embedding, and of an untied head; only these rows are trained.

PEFT trains the rows (`trainable_token_indices`): it keeps them separately and substitutes them for the base's rows, so
a saved adapter holds their full values, whatever the base's rows were initialised to.
"""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.errors import Problem, RecipeError, WeightsError


def check_vocabulary(rows: int, highest_id: int, added: int, where: str) -> None:
    """Raise WeightsError if the tokenizer has ids without an embedding row; `added`: ids that the recipe adds.

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
    """Initialise the rows of new ids (ascending, above all known ones) with the mean of the known tokens' rows.

    A checkpoint may have spare rows after its vocabulary: their values are arbitrary, so they are set as well. The
    matrices are extended only where they have no row for an id.
    """
    if not tokens:
        return
    _check_head(model)
    if tokens[-1] >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens[-1] + 1, mean_resizing=False)
    with torch.no_grad():
        for module in vocabulary_modules(model).values():
            # The noise that transformers adds to the mean is 3e-5 of the rows' own deviation: bfloat16 rounds it away.
            module.weight[list(tokens)] = module.weight[: tokens[0]].mean(0, dtype=torch.float32).to(module.weight)


def vocabulary_modules(model: Any) -> dict[str, Any]:
    """Embedding and, where it has a weight of its own, head of a base model, by path."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in wanted)}


def complete_head(model: Any) -> None:
    """Give PEFT's wrapper of the head the attribute `bias` of a linear layer, which TRL's fused loss reads."""
    model.get_output_embeddings().bias = None


def _check_head(model: Any) -> None:
    """Raise RecipeError unless the head is a linear layer without bias, as PEFT's rows of new tokens require."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        what = f"the head of {model.config.model_type} has a bias, or is no linear layer: its rows cannot be trained"
        raise RecipeError(Problem("model.added_tokens", what, "take the added tokens out", got=type(head).__name__))
