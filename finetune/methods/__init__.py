"""The training methods, SFT and DPO: trainers on top of TRL's.

Losses are normalised by the optimizer step, and figures are sums over it; DPO also has its reference and the stored
log-probabilities of it.
"""

from types import ModuleType


def method_of(kind: str) -> ModuleType:
    """The module of a method, with `prepare_rows` and `make_trainer`."""
    from finetune.methods import dpo, sft

    return {"sft": sft, "dpo": dpo}[kind]
