"""The settings of a recipe. Each field's description, with its unit, is the documentation (see `reference.py`).

Strict: no value is converted (an integer stands for a whole float, nothing else). No default for what decides
the result.
What concerns several fields at once is in `checks.py`.
"""

from typing import Literal

from pydantic import Field

from finetune.recipe.data_settings import DataSettings
from finetune.recipe.method_settings import DpoSettings, SftSettings
from finetune.recipe.section import Section, Text

Scalar = bool | int | float | str | None
Dtype = Literal["float32", "bfloat16", "float16"]
Dashboard = Literal["wandb", "trackio", "tensorboard"]
Recomputation = Literal["none", "selective", "full"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup"]

MAX_RANK = 1024
MAX_SEED = 2**32 - 1


class ModelSettings(Section):
    """The base model and how it is loaded."""

    name_or_path: Text = Field(description="Folder of a Hugging Face checkpoint, or its name on the hub.")
    revision: Text | None = Field(
        default=None, description="Commit, tag or branch of a checkpoint on the hub; null: its main branch."
    )
    adapter: Text | None = Field(
        default=None,
        description="Folder of a saved adapter to continue from; for dpo it is also the reference. Its base, "
        "quantization, chat template and `lora` section must match. null: a fresh adapter.",
    )
    load_in_4bit: bool = Field(
        description="Store attention and experts as NF4 (4 bits a weight, double quantisation) while they load. "
        "Embeddings, router, norms and head keep `dtype`."
    )
    dtype: Dtype = Field(description="Type of the computation and of all that is not quantised.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="Attention code of transformers; flash_attention_2 needs its own package and a GPU."
    )
    added_tokens: list[Text] = Field(
        default=[],
        description="Special tokens that the template needs and the checkpoint's vocabulary lacks. Each gets a row of "
        "the embedding, and of the head where that has its own weight; these rows start as the mean of the others and "
        "are trained without weight decay. All other rows stay as they are; with an empty list all do.",
    )
    eos_token: Text | None = Field(
        default=None,
        description="Special token that ends an answer, one of the vocabulary or of `added_tokens`; null: the "
        "checkpoint's own.",
    )


class LoraSettings(Section):
    """The adapter: what is trained, everything else is frozen."""

    targets: list[Text] = Field(
        description="What is adapted: attention, experts, router, mlp (the feed-forward of layers without experts), "
        "shared_experts (those that see every token), or explicit module names such as q_proj. `finetune families` "
        "lists what each architecture has."
    )
    r: int = Field(ge=1, le=MAX_RANK, description="Rank of the adapter matrices.")
    lora_alpha: float = Field(
        gt=0, description="Numerator of the scale: lora_alpha / r, with use_rslora lora_alpha / sqrt(r)."
    )
    expert_r: int | None = Field(
        default=None, ge=1, le=MAX_RANK, description="Rank of the expert stacks' matrices; null: the same as `r`."
    )
    expert_lora_alpha: float | None = Field(
        default=None, gt=0, description="Numerator of the expert stacks' scale; null: the same as `lora_alpha`."
    )
    experts: Literal["all", "auto"] = Field(
        default="all",
        description="Which experts are adapted. all: every one; auto: before the first step the frozen base runs over "
        "training rows, and in each layer only the experts that matter for them are adapted (ESFT, arXiv 2407.01906); "
        "the choice is printed and written to experts.json of the run folder.",
    )
    experts_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Required with experts: auto. In each layer the smallest set of experts is adapted whose scores "
        "reach this share of the layer's sum; 1: all experts that were used at all. The paper takes 0.1 (gate) and 0.2 "
        "(token) for 64 experts, six a token.",
    )
    experts_score: Literal["gate", "token"] = Field(
        default="gate",
        description="With experts: auto, an expert's score. gate: its router weight, averaged over all tokens; token: "
        "its share of the tokens' top-k choices.",
    )
    experts_tokens: int = Field(
        default=131072,
        ge=1,
        description="With experts: auto, tokens that are measured: whole training rows, drawn with `seed` until there "
        "are so many, or all rows. The default is the paper's 32 sequences of 4,096.",
    )
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability that an input element of an adapter is dropped in training. Must be 0 with router in "
        "`targets`. With experts the saved adapter says 0: stock PEFT refuses another value, and none is used after "
        "training.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (arXiv 2312.03732)."
    )


class RouterSettings(Section):
    """Mixture-of-Experts models only, and required for them."""

    router_aux_loss_coef: float = Field(
        ge=0,
        description="Weight of the balance loss, E * sum_e f_e P_e (`top_k` when balanced), in the loss that is "
        "minimised; 0 trains without it. The checkpoint's own coefficient is never used.",
    )
    balance: Literal["per_layer", "pooled"] = Field(
        default="per_layer",
        description="per_layer: the balance loss of each layer, averaged. pooled: f and P are averaged over layers "
        "before they are multiplied. That is transformers' number, and worse: layers that collapsed onto different "
        "experts score as well as balanced ones.",
    )
    scope: Literal["step", "micro_batch"] = Field(
        default="step",
        description="What f is counted on. step: all tokens of the previous optimizer step; the result is the same "
        "however a step is cut into micro-batches and processes. micro_batch: the tokens of the micro-batch itself, as "
        "is classic, averaged over the step by real tokens; the strength does not depend on the cut, the value does.",
    )
    router_z_loss_coef: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the z-loss, the mean of logsumexp(router logits)^2 over real tokens and layers "
        "(arXiv 2202.08906), in the loss that is minimised.",
    )
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        description="Balancing without a loss (arXiv 2412.19437): after each optimizer step the correction bias of "
        "each expert moves by this much, up if it got fewer tokens than the mean, down if more; 0 leaves it. Only "
        "where the routers carry such a bias. The result is written beside the adapter and merged with it.",
    )


class TrainingSettings(Section):
    """How long, how fast, in what steps. Batch sizes are global: the number of GPUs does not change the result."""

    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps of the run. Exactly one of this and num_train_epochs."
    )
    num_train_epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training rows. Exactly one of this and max_steps."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    global_batch_size: int = Field(
        ge=1, description="Rows an optimizer step, over all processes and micro-batches together."
    )
    per_device_train_batch_size: int = Field(
        default=1,
        ge=1,
        description="Rows of one micro-batch on one device; must divide global_batch_size.",
    )
    lr_scheduler_type: Scheduler = Field(default="cosine", description="Course of the learning rate after the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warm-up from 0.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay: a step shrinks a trained weight by the part learning_rate * weight_decay.",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Global L2 norm to which gradients are clipped.")
    optim: Text = Field(default="adamw_torch", description="Optimizer, by the name transformers gives it.")
    gradient_checkpointing: Recomputation = Field(
        default="full",
        description="What of a layer's forward is computed again in the backward instead of being kept. none: nothing, "
        "fastest; selective: all but the matrix products, attention and experts; full: all, smallest.",
    )
    logging_steps: int = Field(default=1, ge=1, description="Optimizer steps between two logged lines.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between two evaluations on data.eval; null: none in between."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between two checkpoints; null: none in between."
    )
    resume_from_checkpoint: bool = Field(
        default=False, description="Continue from the newest checkpoint in output_dir."
    )
    trainer_args: dict[str, Scalar] = Field(
        default_factory=dict,
        description="Further fields of TRL's SFTConfig or DPOConfig, passed through as they are; names and types are "
        "checked against the installed version. What the recipe names itself is refused here.",
    )


class LoggingSettings(Section):
    """Where the curves go."""

    report_to: list[Dashboard] | Literal["auto", "none"] = Field(
        default="auto", description="Dashboards; auto: wandb where an account is set up, else trackio."
    )
    project: Text = Field(default="moe-finetune", description="Project under which the dashboards file the run.")
    run_name: Text | None = Field(default=None, description="Name of the run; null: the last part of output_dir.")
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", description="offline: W&B writes to the local disk only, to be synchronised later."
    )


class Recipe(Section):
    """A fine-tuning run: everything that decides its result, and nothing about the machine."""

    output_dir: Text = Field(description="Folder of the run, made when it starts; relative to the working directory.")
    seed: int = Field(
        default=42, ge=0, le=MAX_SEED, description="Seed of the adapter's start, the order of rows and dropout."
    )
    model: ModelSettings = Field(description="The base model.")
    lora: LoraSettings = Field(description="The adapter.")
    router: RouterSettings | None = Field(
        default=None, description="The router of a Mixture-of-Experts model; null for dense models."
    )
    method: SftSettings | DpoSettings = Field(
        discriminator="kind", description="What is trained for. Which keys there are depends on `kind`."
    )
    data: DataSettings = Field(description="The rows.")
    training: TrainingSettings = Field(description="The course of the training.")
    logging: LoggingSettings = Field(default_factory=LoggingSettings, description="The dashboards.")
