"""Floor 5: TRL's trainers plus the router term, nothing more. One module a method: `sft_run`, `dpo_run`."""

from types import ModuleType


def method_of(kind: str) -> ModuleType:
    """The module of a method, with `prepare_rows` (what it makes of the data) and `make_trainer`."""
    from finetune.methods import dpo_run, sft_run

    return {"sft": sft_run, "dpo": dpo_run}[kind]
