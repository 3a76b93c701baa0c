"""What `training.trainer_args` takes: fields of TRL's SFTConfig and DPOConfig that the recipe does not set itself.

Written out, so that a recipe is checked without importing torch; a test compares the lists with the installed TRL.
"""

from dataclasses import dataclass

TRAINER_CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
"""TRL's name of a method's settings."""

# Fields that are passed on, by their annotation. SFTConfig and DPOConfig inherit all of them.
_PASSED = {
    "bool": (
        "batch_eval_metrics",
        "dataloader_in_order",
        "dataloader_persistent_workers",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_use_gather_object",
        "full_determinism",
        "log_on_each_node",
        "logging_first_step",
        "prediction_loss_only",
        "skip_memory_metrics",
        "torch_compile",
    ),
    "bool | None": (
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "disable_tqdm",
        "greater_is_better",
        "tf32",
    ),
    "int": ("dataloader_num_workers",),
    "int | None": (
        "dataloader_prefetch_factor",
        "ddp_bucket_cap_mb",
        "eval_accumulation_steps",
        "torch_empty_cache_steps",
    ),
    "float": ("adam_beta1", "adam_beta2", "adam_epsilon", "eval_delay"),
    "float | None": ("neftune_noise_alpha",),
    "str": ("length_column_name", "log_level", "log_level_replica", "train_sampling_strategy"),
    "str | None": (
        "dataloader_multiprocessing_context",
        "ddp_backend",
        "metric_for_best_model",
        "optim_args",
        "torch_compile_backend",
        "torch_compile_mode",
    ),
    "str | bool": ("include_num_input_tokens_seen",),
    "dict | str | None": ("lr_scheduler_kwargs",),
    "list[str]": ("include_for_metrics",),
    "str | list[DebugOption]": ("debug",),
    "None | str | list[str]": ("optim_target_modules",),
}
# Types of a scalar; a dict, a list or an enum is written as text, which the trainer reads.
_SCALARS: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
}

OPTIMIZERS = (
    "adafactor",
    "adagrad",
    "adalomo",
    "adamw_8bit",
    "adamw_anyprecision",
    "adamw_bnb_8bit",
    "adamw_torch",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_torch_fused",
    "adamw_torch_npu_fused",
    "adamw_torch_xla",
    "ademamix",
    "ademamix_8bit",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "galore_adafactor",
    "galore_adafactor_layerwise",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adamw_8bit_layerwise",
    "galore_adamw_layerwise",
    "grokadamw",
    "lion_32bit",
    "lion_8bit",
    "lomo",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
    "stable_adamw",
)
"""The values of transformers' `OptimizerNames`."""

_IN_BACKWARD = "changes the weights in the backward pass: no gradient is left to add up over micro-batches or to clip"
_LOW_RANK = "compresses the gradients of whole weight matrices, and here only the adapter, which is small, is trained"
_AVERAGED = "trains other weights than it averages: checkpoints and the adapter would hold those that are not averaged"

REFUSED_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(("lomo", "adalomo"), _IN_BACKWARD),
    **dict.fromkeys((name for name in OPTIMIZERS if name.startswith(("galore_", "apollo_"))), _LOW_RANK),
    **dict.fromkeys((name for name in OPTIMIZERS if name.startswith("schedule_free_")), _AVERAGED),
    "adamw_torch_xla": "is for TPUs, which this program does not run on",
    "adamw_torch_npu_fused": "is for Ascend NPUs, which this program does not run on",
}
"""Optimizers that cannot train an adapter here even with their package, and why."""

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "detail", "passive")
CHOICES: dict[str, tuple[str, ...]] = {
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
"""The values of fields whose other values transformers takes for the default, or stops at once the model is loaded."""

AT_LEAST: dict[str, int] = {
    "dataloader_num_workers": 0,
    "ddp_bucket_cap_mb": 1,
    "eval_accumulation_steps": 1,
    "eval_delay": 0,
}
"""The smallest value of fields for which transformers does not check it."""


@dataclass(frozen=True)
class TrainerField:
    """One field: its annotation in TRL, and the scalar types it accepts."""

    annotation: str
    accepts: tuple[type, ...]

    def takes(self, value: object) -> bool:
        """True where `value` fits the annotation; true and false are no integers."""
        if isinstance(value, bool):
            return bool in self.accepts
        return isinstance(value, self.accepts)


def _field(annotation: str) -> TrainerField:
    accepts = [scalar for option in annotation.split(" | ") for scalar in _SCALARS.get(option, (str,))]
    return TrainerField(annotation, tuple(accepts))


PASSED: dict[str, TrainerField] = {name: _field(annotation) for annotation, names in _PASSED.items() for name in names}
"""Fields that `trainer_args` passes on, for both methods."""

# The recipe's own key for a field of the same meaning.
_NAMED = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "eval_packing": "data.packing",
    "truncation_mode": "data.overlong",
    "chat_template_path": "data.chat_template",
    "assistant_only_loss": "data.loss_on",
    "completion_only_loss": "data.loss_on",
    "dataset_text_field": "data.train.columns",
    "eos_token": "model.eos_token",
    "pad_token": "model.pad_token",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_train_epochs",
    "learning_rate": "training.learning_rate",
    "per_device_train_batch_size": "training.per_device_train_batch_size",
    "lr_scheduler_type": "training.lr_scheduler_type",
    "warmup_steps": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "optim": "training.optim",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "logging_steps": "training.logging_steps",
    "logging_strategy": "training.logging_steps",
    "eval_steps": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "save_steps": "training.save_steps",
    "save_strategy": "training.save_steps",
    "save_total_limit": "save.keep",
    "resume_from_checkpoint": "training.resume",
    "ddp_timeout": "training.rank_timeout",
    "report_to": "logging.report_to",
    "run_name": "logging.run_name",
    "project": "logging.project",
    "router_aux_loss_coef": "router.router_aux_loss_coef",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype",
    "gradient_accumulation_steps": "training.global_batch_size",
    "auto_find_batch_size": "training.global_batch_size",
}

_TOKENS = "this program tokenises, pads and masks the rows"
_LOSS = "this program computes the loss: cross entropy over the whole step plus the balance term"
_HARDWARE = "hardware is not part of a recipe"
_EXACT = "every row is used, and a resumed run equals an uninterrupted one"
_CHECKPOINTING = "checkpointing is always non-reentrant and keeps the routing"
_HUB = "a run uploads nothing"
_LAUNCHER = "the launcher sets it"
_SAVING = "checkpoints are written whole, once, and hold everything that a continued run needs"
_BEST = "the best checkpoint is kept beside the last one, and RUN@best names it for merge, export and evaluate"
_COMMANDS = "a run trains, and evaluates where data.eval is given"

_SET_BY_US = {
    **dict.fromkeys(
        (
            "dataset_kwargs",
            "dataset_num_proc",
            "padding_free",
            "packing_strategy",
            "pad_to_multiple_of",
            "remove_unused_columns",
            "label_names",
            "shuffle_dataset",
        ),
        _TOKENS,
    ),
    **dict.fromkeys(
        (
            "loss_type",
            "label_smoothing_factor",
            "average_tokens_across_devices",
            "use_liger_kernel",
            "liger_kernel_config",
        ),
        _LOSS,
    ),
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "activation_offloading"), _CHECKPOINTING
    ),
    **dict.fromkeys(
        (
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "accelerator_config",
            "parallelism_config",
            "use_cpu",
            "dataloader_pin_memory",
        ),
        _HARDWARE,
    ),
    **dict.fromkeys(("local_rank",), _LAUNCHER),
    **dict.fromkeys(("dataloader_drop_last", "ignore_data_skip", "save_only_model"), _EXACT),
    **dict.fromkeys(("enable_jit_checkpoint", "restore_callback_states_from_checkpoint", "save_on_each_node"), _SAVING),
    "load_best_model_at_end": _BEST,
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _COMMANDS),
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "trackio_space_id",
            "trackio_bucket_id",
            "trackio_static_space_id",
        ),
        _HUB,
    ),
    "model_init_kwargs": "the section model says how the model is loaded",
    "trust_remote_code": "code from a checkpoint is never run",
    "logging_nan_inf_filter": "a non-finite loss stops the run",
    "per_device_eval_batch_size": "it follows from data.max_length, and no figure depends on it",
    "use_cache": "training keeps no key-value cache",
    "ddp_find_unused_parameters": "every trained parameter takes part in every forward",
}

# Fields of TRL's DPOConfig that a recipe's `method` section has under the same names.
_DPO_NAMED = (
    "beta",
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
)
_START = "the reference is the model before training and does not change"
_DPO_SET_BY_US = {
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _START),
    "disable_dropout": "lora.lora_dropout is used, and the reference has no dropout",
}

_RESERVED: dict[str, tuple[str, str]] = {
    **{name: ("the recipe has its own key for this", f"remove it and write {ours}") for name, ours in _NAMED.items()},
    **{name: (f"set by this program: {why}", "remove it") for name, why in _SET_BY_US.items()},
}
_DPO_RESERVED = {
    **_RESERVED,
    **{name: ("the recipe has its own key for this", f"remove it and write method.{name}") for name in _DPO_NAMED},
    **dict.fromkeys(
        ("precompute_ref_log_probs", "precompute_ref_batch_size"),
        ("the recipe has its own key for this", "remove it and write method.reference"),
    ),
    **{name: (f"set by this program: {why}", "remove it") for name, why in _DPO_SET_BY_US.items()},
}


def reserved(kind: str) -> dict[str, tuple[str, str]]:
    """Field -> (what is wrong with it in `trainer_args`, what to do), for a method."""
    return _DPO_RESERVED if kind == "dpo" else _RESERVED
