"""Keys that people type from the habit of other tools (TRL, PEFT, axolotl ...), and what to write here instead.

Only the common ones. Names of another section, and misspelt ones, are found by `error_messages.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """`what` is wrong with a foreign key, and what to `do`."""

    what: str
    do: str


# The same meaning under another name.
_RENAMED = {
    "model.name_or_path": ("model_name_or_path", "base_model"),
    "model.dtype": ("torch_dtype", "bf16"),
    "lora.targets": ("lora_target_modules", "target_modules"),
    "lora.r": ("lora_r", "lora_rank", "rank"),
    "data.train.id": ("dataset_name",),
    "data.max_length": ("max_seq_length", "sequence_len", "cutoff_len"),
    "data.packing": ("sample_packing",),
    "data.template_args": ("chat_template_kwargs", "chat_template_args"),
    "training.num_train_epochs": ("num_epochs",),
    "training.learning_rate": ("lr",),
    "training.global_batch_size": ("batch_size",),
    "training.per_device_train_batch_size": ("micro_batch_size",),
    "training.optim": ("optimizer",),
    "training.rank_timeout": ("ddp_timeout",),
    "save.keep": ("save_total_limit",),
    "logging.project": ("wandb_project",),
    "logging.run_name": ("wandb_name",),
    "method.kind": ("rl",),
}
_RENAMED_IN_SOURCE = {"format": ("type",), "config": ("name",)}

_DATA_SETS = Foreign(
    "another tool's list of data sets",
    "write data.train: one data set with path (or id) and format, or a list of them; and data.eval likewise",
)
_ALWAYS_LORA = "always LoRA here, QLoRA with model.load_in_4bit: true"

# Another meaning, or no counterpart.
_OTHER = {
    "dataset_mixture": _DATA_SETS,
    "datasets": _DATA_SETS,
    "val_set_size": Foreign(
        "no rows are split off automatically", "write data.eval with path (or id) and format of a held-out set"
    ),
    "assistant_only_loss": Foreign(
        "another tool's name for the supervised tokens", "remove it: assistant is the default of data.loss_on"
    ),
    "train_on_inputs": Foreign(
        "another tool's name for the supervised tokens",
        "write data.loss_on: all to train on the prompt too; else remove it",
    ),
    "gradient_accumulation_steps": Foreign(
        "derived from global_batch_size, the processes and per_device_train_batch_size",
        "remove it and write training.global_batch_size: the rows of a whole optimizer step",
    ),
    "warmup_ratio": Foreign("warm-up is counted in steps here", "write training.warmup_steps"),
    "adapter": Foreign(_ALWAYS_LORA, "remove it; an earlier adapter to start from is named in model.adapter"),
    "flash_attention": Foreign(
        "another tool's name for a setting", "write model.attn_implementation: flash_attention_2, or remove it"
    ),
    **{
        name: Foreign("a variable of the chat template", f"write data.template_args.{name}")
        for name in ("enable_thinking", "reasoning_effort")
    },
    "resume_from_checkpoint": Foreign(
        "a run continues by itself since training.resume took its place",
        "remove it, or write training.resume: never to start anew, or the path of one of the run's checkpoints",
    ),
    "load_best_model_at_end": Foreign(
        "the best checkpoint is kept beside the last one", "remove it, and merge, export or evaluate RUN@best"
    ),
    "loss_watchdog_threshold": Foreign("another tool's name for a setting", "write watchdog.loss_spike.ceiling"),
    "precompute_ref_log_probs": Foreign(
        "another tool's name for a setting", "write method.reference: precomputed, or method.reference: live for false"
    ),
    "use_peft": Foreign(_ALWAYS_LORA, "remove it"),
    "special_tokens": Foreign(
        "another tool's mapping of special tokens",
        "write model.pad_token or model.eos_token; a token that the vocabulary lacks in model.added_tokens, too",
    ),
    "modules_to_save": Foreign("no module is trained in full here", "remove it: lora.targets names what is adapted"),
    "ref_model": Foreign(
        "the reference is the base as it is loaded, or the adapter that the run starts from",
        "remove it; a run starts from an earlier adapter with model.adapter",
    ),
    "deepspeed": Foreign(
        "hardware is not part of a recipe", "remove it and choose a file of accelerate_configs/ for accelerate launch"
    ),
    "trust_remote_code": Foreign("code from a checkpoint is never run", "remove it"),
    "push_to_hub": Foreign("a run uploads nothing", "remove it and upload the merged folder when you want to"),
}


def _renamed(table: Mapping[str, tuple[str, ...]]) -> dict[str, Foreign]:
    return {
        name: Foreign("another tool's name for a setting", f"write {ours}")
        for ours, names in table.items()
        for name in names
    }


FOREIGN: dict[str, Foreign] = _renamed(_RENAMED) | _OTHER
FOREIGN_IN_SOURCE: dict[str, Foreign] = _renamed(_RENAMED_IN_SOURCE)
"""Keys of one data set in other tools, which would mean something else in another section."""
