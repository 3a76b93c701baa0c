"""The training methods: trainers on top of TRL's, with losses normalised by the optimizer step and figures as sums over
it, the router term, and for DPO the reference and its stored log-probabilities.

`sft` and `dpo` prepare the rows and the trainer of a recipe.
"""

from types import ModuleType


def method_of(kind: str) -> ModuleType:
    """The module of a method, with `prepare_rows` and `make_trainer`."""
    from finetune.methods import dpo, sft

    return {"sft": sft, "dpo": dpo}[kind]
