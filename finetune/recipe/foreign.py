"""Keys that people type from the habit of other tools, and what to write here instead.

TRL, alignment-handbook, axolotl, LLaMA-Factory, mistral-finetune, torchtune. Names that are right but stand in the
wrong section are not listed: `unknown.py` finds them in the settings themselves.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """`what` is wrong with a foreign key, and what to `do`."""

    what: str
    do: str


# Same meaning, other name.
_RENAMED = {
    "model.name_or_path": "model_name_or_path base_model model_name model_id base_model_name_or_path "
    "pretrained_model_name_or_path model_id_or_path model_path",
    "model.revision": "model_revision base_model_revision",
    "model.load_in_4bit": "quantization_bit use_4bit load_4bit",
    "model.dtype": "torch_dtype bnb_4bit_compute_dtype bf16 fp16 compute_dtype mixed_precision",
    "model.attn_implementation": "flash_attention flash_attn use_flash_attention_2 sdp_attention xformers_attention",
    "lora.targets": "lora_target_modules target_modules lora_target lora_target_linear target_parameters "
    "lora_target_parameters lora_attn_modules",
    "lora.r": "lora_r lora_rank rank lora_dim",
    "lora.lora_alpha": "alpha lora_scaling",
    "lora.lora_dropout": "dropout",
    "lora.use_rslora": "peft_use_rslora lora_use_rslora rslora",
    "lora.expert_r": "expert_rank expert_lora_r moe_lora_rank",
    "router.router_aux_loss_coef": "aux_loss_coef moe_aux_loss_coef moe_aux_loss_coeff load_balancing_loss_weight "
    "router_loss_coef",
    "router.router_z_loss_coef": "z_loss_coef moe_z_loss_coeff moe_z_loss_coef router_z_loss z_loss_weight",
    "router.bias_update_rate": "moe_router_bias_update_rate router_bias_update_rate bias_update_speed "
    "moe_router_bias_update_speed load_balance_coeff",
    "data.train.path": "train_file train_data instruct_data dataset_path dataset_name dataset_id",
    "data.train.format": "dataset_type dataset_format formatting",
    "data.eval.path": "eval_file validation_file eval_instruct_data test_file eval_dataset eval_data",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_len cutoff_len model_max_length "
    "block_size context_length",
    "data.chat_template": "template chat_template_path chat_template_jinja prompt_template",
    "data.packing": "sample_packing pack_sequences packed neat_packing",
    "training.max_steps": "max_iters train_steps total_steps num_steps",
    "training.num_train_epochs": "num_epochs epochs n_epochs max_epochs",
    "training.learning_rate": "lr",
    "training.global_batch_size": "batch_size total_batch_size effective_batch_size train_batch_size",
    "training.per_device_train_batch_size": "micro_batch_size per_device_batch_size micro_train_batch_size "
    "per_gpu_train_batch_size",
    "training.lr_scheduler_type": "lr_scheduler scheduler",
    "training.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "training.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm max_norm",
    "training.optim": "optimizer optimizer_type",
    "training.gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing "
    "use_gradient_checkpointing",
    "training.logging_steps": "log_freq log_every_n_steps log_interval",
    "training.eval_steps": "eval_freq eval_interval eval_every",
    "training.save_steps": "ckpt_freq save_interval checkpoint_interval",
    "training.resume_from_checkpoint": "resume auto_resume_from_checkpoints resume_checkpoint",
    "training.trainer_args": "training_args trainer_kwargs sft_config kwargs",
    "logging.project": "wandb_project trackio_project",
    "logging.run_name": "wandb_run_name wandb_name wandb_run_id experiment_name",
    "logging.report_to": "use_wandb loggers logger log_with wandb_watch wandb_enabled",
    "output_dir": "out_dir output_path run_dir save_dir",
    "seed": "random_seed manual_seed",
    "method.kind": "stage finetuning_type task trainer_type rl",
}

_DPO = ("beta", "rl_beta", "dpo_beta", "pref_beta", "pref_loss", "ref_model", "max_prompt_length")
_NF4 = Foreign("not a choice here: 4-bit storage is NF4 with double quantisation", "write model.load_in_4bit only")
_HARDWARE = Foreign(
    "hardware is not part of a recipe", "remove it and choose a file of accelerate_configs/ for accelerate launch"
)
_ASSISTANT_ONLY = Foreign("not a choice here: the loss is on the assistant's tokens only", "remove it")
_SOURCES = Foreign(
    "another tool's list of datasets", "write data.train with path and format (one JSONL file), and data.eval likewise"
)

# Another meaning, or none here.
_SPECIAL = {
    **{name: Foreign(f"{name} is a DPO setting", "remove it") for name in _DPO},
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"), _NF4
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp", "num_gpus", "num_processes", "accelerator_config"), _HARDWARE
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "train_on_inputs", "completion_only_loss", "train_on_prompt"), _ASSISTANT_ONLY
    ),
    **dict.fromkeys(
        (
            "dataset_mixer",
            "dataset_mixture",
            "datasets",
            "dataset",
            "dataset_config",
            "dataset_splits",
            "test_datasets",
        ),
        _SOURCES,
    ),
    "gradient_accumulation_steps": Foreign(
        "derived from global_batch_size, the processes and per_device_train_batch_size",
        "remove it and write training.global_batch_size: the rows of a whole optimizer step",
    ),
    "warmup_ratio": Foreign("warm-up is counted in steps here", "write training.warmup_steps"),
    "evals_per_epoch": Foreign("evaluations are counted in steps here", "write training.eval_steps"),
    "saves_per_epoch": Foreign("checkpoints are counted in steps here", "write training.save_steps"),
    "modules_to_save": Foreign("no module is trained in full here", "name what to adapt in lora.targets"),
    "lora_bias": Foreign("biases are not trained here", "remove it"),
    "val_set_size": Foreign("no rows are split off here", "write data.eval with path and format of a held-out file"),
    "dataset_test_split": Foreign(
        "no rows are split off here", "write data.eval with path and format of a held-out file"
    ),
    "load_in_8bit": Foreign("8-bit storage is not offered", "write model.load_in_4bit: true or false"),
    "adapter": Foreign("always LoRA here, QLoRA with model.load_in_4bit: true", "remove it"),
    "use_peft": Foreign("always LoRA here, QLoRA with model.load_in_4bit: true", "remove it"),
    "trust_remote_code": Foreign("code from a checkpoint is never run", "remove it"),
    "gradient_checkpointing_kwargs": Foreign("checkpointing is always non-reentrant here", "remove it"),
    "output_router_logits": Foreign(
        "router logits are read when the balance term needs them", "remove it and write router.router_aux_loss_coef"
    ),
    "hub_token": Foreign("a secret does not belong in a recipe", "remove it and log in with the hub's own command"),
    "push_to_hub": Foreign("nothing is uploaded by a run", "remove it and upload the merged folder when you want to"),
}

FOREIGN: dict[str, Foreign] = {
    **{
        name: Foreign("another tool's name for a setting", f"write {ours}")
        for ours, names in _RENAMED.items()
        for name in names.split()
    },
    **_SPECIAL,
}
