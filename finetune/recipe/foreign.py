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
    "data.train.path": "train_file train_data instruct_data dataset_path dataset_dir data_files data_dir data_path",
    "data.train.id": "dataset_name dataset_id hf_hub_url ms_hub_url repo_id",
    "data.train.config": "dataset_config dataset_config_name dataset_subset config_name subset",
    "data.train.split": "dataset_train_split dataset_split train_split",
    "data.train.streaming": "dataset_streaming",
    "data.train.format": "dataset_type dataset_format formatting",
    "data.train.max_rows": "max_samples max_train_samples num_samples max_examples",
    "data.eval": "eval_dataset test_datasets eval_datasets",
    "data.eval.path": "eval_file validation_file eval_instruct_data test_file eval_data",
    "data.eval.max_rows": "max_eval_samples",
    "data.on_bad_row": "skip_bad_rows ignore_errors skip_invalid",
    "data.system": "system_policy",
    "data.overlong": "excess_length_strategy truncation_mode truncation_strategy truncation",
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
    "method.beta": "rl_beta dpo_beta pref_beta",
    "method.loss_type": "pref_loss dpo_loss_type dpo_loss",
    "method.label_smoothing": "dpo_label_smoothing",
    "method.reference": "precompute_ref_log_probs precompute_ref_logps precompute_ref_batch_size",
    "model.adapter": "lora_model_dir adapter_name_or_path adapter_path adapter_model lora_path sft_adapter",
}

_REFERENCE = Foreign(
    "the reference is the base as it is loaded, or the adapter that the run starts from",
    "remove it; a run starts from an earlier adapter with model.adapter",
)
_SFT_TERM = Foreign(
    "the cross entropy of the chosen answers is one of the losses",
    "write method.loss_type: [sigmoid, sft], and its weight in method.loss_weights",
)
_NF4 = Foreign("not a choice here: 4-bit storage is NF4 with double quantisation", "write model.load_in_4bit only")
_HARDWARE = Foreign(
    "hardware is not part of a recipe", "remove it and choose a file of accelerate_configs/ for accelerate launch"
)
_SOURCES = Foreign(
    "another tool's list of data sets",
    "write data.train: one data set with path (or id) and format, or a list of them; and data.eval likewise",
)
_COLUMN = Foreign(
    "columns are renamed by the fields of the format",
    "write data.train.columns: {field of the format: column of the file}",
)
_PROPORTIONS = Foreign(
    "how often a data set is drawn stands with the data set", "write a list in data.train, each with its weight"
)
_HELD_OUT = Foreign("no rows are split off here", "write data.eval with path (or id) and format of a held-out set")
_CACHE = Foreign(
    "token rows are cached by what they were made from: files, tokenizer, template, settings",
    "remove it: nothing stale is ever read",
)
_PROCESSES = Foreign("tokenising uses all cores by itself", "remove it")
_SHUFFLED = Foreign("training rows are always shuffled, by `seed`", "remove it")
_LOSS_ON = "another tool's name for what is supervised"
_END_TOKENS = Foreign("the end token of every supervised answer is supervised", "remove it")
_PADS = Foreign("padding is never in the loss", "remove it")
_TURN_MARKS = Foreign("where answers begin and end is found from the chat template", "remove it")
_SYSTEM = Foreign("no words are added to the rows here", "remove it and put a system message into the rows")

# Another meaning, or none here.
_SPECIAL = {
    **dict.fromkeys(("ref_model", "reference_model", "ref_model_name_or_path", "ref_adapter_name"), _REFERENCE),
    **dict.fromkeys(("rpo_alpha", "pref_ftx", "dpo_ftx"), _SFT_TERM),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length"),
        Foreign("prompt and answer have one limit together", "write data.max_length"),
    ),
    "reference_free": Foreign("no loss without a reference is offered", "remove it"),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization"), _NF4
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "ddp", "num_gpus", "num_processes", "accelerator_config"), _HARDWARE
    ),
    **dict.fromkeys(
        ("assistant_only_loss", "train_on_responses_only", "roles_to_train", "train_on_completions_only"),
        Foreign(_LOSS_ON, "write data.loss_on: assistant, which is the default"),
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_input", "train_on_prompt", "train_on_source"),
        Foreign(_LOSS_ON, "write data.loss_on: all where the prompt is learnt too; else remove it"),
    ),
    "completion_only_loss": Foreign(_LOSS_ON, "write data.loss_on: completion"),
    **dict.fromkeys(
        ("mask_history", "train_on_last_turn_only", "train_last_message_only"),
        Foreign(_LOSS_ON, "write data.loss_on: last_assistant"),
    ),
    **dict.fromkeys(("train_on_eos", "train_on_eot", "add_eos_token", "append_eos"), _END_TOKENS),
    "ignore_pad_token_for_loss": _PADS,
    **dict.fromkeys(("instruction_part", "response_part", "response_template", "instruction_template"), _TURN_MARKS),
    **dict.fromkeys(("default_system", "default_system_message", "system_prompt"), _SYSTEM),
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "datasets", "dataset", "dataset_splits"), _SOURCES),
    **dict.fromkeys(("interleave_probs", "dataset_probs", "dataset_weights", "probabilities"), _PROPORTIONS),
    "mix_strategy": Foreign(
        "data sets are mixed by their weights",
        "write a weight for each data set of data.train, and data.stopping_strategy; without them all rows are taken",
    ),
    **dict.fromkeys(
        (
            "dataset_text_field",
            "text_column",
            "text_field",
            "field",
            "field_instruction",
            "field_input",
            "field_output",
            "field_system",
            "field_messages",
            "message_property_mappings",
            "message_field_role",
            "message_field_content",
            "column_map",
            "input_key",
            "output_key",
        ),
        _COLUMN,
    ),
    **dict.fromkeys(
        (
            "dataset_prepared_path",
            "tokenized_path",
            "overwrite_cache",
            "dataset_cache_dir",
        ),
        _CACHE,
    ),
    **dict.fromkeys(("dataset_num_proc", "preprocessing_num_workers", "dataset_processes", "num_proc"), _PROCESSES),
    **dict.fromkeys(("shuffle_merged_datasets", "shuffle_dataset", "shuffle_before_merging_datasets"), _SHUFFLED),
    "gradient_accumulation_steps": Foreign(
        "derived from global_batch_size, the processes and per_device_train_batch_size",
        "remove it and write training.global_batch_size: the rows of a whole optimizer step",
    ),
    "warmup_ratio": Foreign("warm-up is counted in steps here", "write training.warmup_steps"),
    "evals_per_epoch": Foreign("evaluations are counted in steps here", "write training.eval_steps"),
    "saves_per_epoch": Foreign("checkpoints are counted in steps here", "write training.save_steps"),
    "modules_to_save": Foreign("no module is trained in full here", "name what to adapt in lora.targets"),
    "lora_bias": Foreign("biases are not trained here", "remove it"),
    **dict.fromkeys(("val_set_size", "val_size", "eval_split_ratio", "test_size"), _HELD_OUT),
    "dataset_test_split": Foreign(
        "the split is a setting of the data set", "write data.eval with id, split and format"
    ),
    "load_in_8bit": Foreign("8-bit storage is not offered", "write model.load_in_4bit: true or false"),
    "adapter": Foreign(
        "always LoRA here, QLoRA with model.load_in_4bit: true",
        "remove it; an earlier adapter to start from is named in model.adapter",
    ),
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

# Keys of one data set in other tools: they would mean something else in another section.
FOREIGN_IN_SOURCE: dict[str, Foreign] = {
    name: Foreign("another tool's name for a setting", f"write {ours}")
    for ours, names in {
        "format": "type style",
        "path": "file file_name files dataset_path",
        "id": "dataset hub_id name_or_path",
        "config": "name subset_name",
        "weight": "proportion probability ratio sampling_ratio fraction share",
        "max_rows": "num_rows rows limit shards",
    }.items()
    for name in names.split()
} | {
    "ranking": Foreign("pairs of answers are a format", "write format: preference"),
    "ds_type": Foreign("the kind of a file is told by its ending", "remove it"),
    "chat_template": Foreign("all data sets of a recipe share one template", "write data.chat_template"),
    "tags": _COLUMN,
}
