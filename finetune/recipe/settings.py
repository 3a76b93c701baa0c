"""The settings of a recipe. Each field's description, with its unit, is the documentation (see `schema.py`).

Strict: no value is converted, except an integer to a float. Settings that decide the result have no default. Checks
over several fields are in `checks.py` and the modules that it imports.
"""

import math
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict

from finetune.recipe.method_settings import DpoSettings, Section, SftSettings, Text
from finetune.recipe.row_formats import FormatName, Role
from finetune.recipe.run_settings import SaveSettings, WatchdogSettings

PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path, or a name; `~` is the home folder."""

LossOn = Literal["assistant", "last_assistant", "completion", "all"]

_A_FILE: JsonDict = {"properties": {"path": {"type": "string"}}, "required": ["path"]}
_A_HUB_SET: JsonDict = {"properties": {"id": {"type": "string"}}, "required": ["id"]}


class DataSource(Section):
    """One data set: local files, or a data set on the hub."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_A_FILE, _A_HUB_SET]})

    path: PathText | None = Field(
        default=None,
        description="A file, a glob, or a folder of `datasets.save_to_disk`; relative to the working directory. "
        "JSONL, JSON, CSV, Parquet and Arrow, recognised by the file extension, also followed by .gz or .zst. Exactly "
        "one of this and id.",
    )
    id: Text | None = Field(
        default=None, description="Name of a hub data set, owner/name. Exactly one of this and path."
    )
    config: Text | None = Field(default=None, description="With id: the configuration (subset); null: the only one.")
    split: Text = Field(default="train", description="With id: the split.")
    revision: Text | None = Field(default=None, description="With id: commit, tag or branch; null: the main branch.")
    streaming: bool = Field(
        default=False,
        description="With id: read rows as they are downloaded and keep no copy of the files; token rows are cached.",
    )
    format: FormatName = Field(
        description="Format of a row; data/examples/ has a file of each. auto: recognised by the rows' columns, "
        "printed with the reason; an error if two formats fit. Conversations: messages (OpenAI chat, with tools), "
        "sharegpt, alpaca, prompt_completion, dolly, oasst (trees). Documents: text; rendered (text that "
        "already has its marks, read as tokens; never recognised by auto). Pairs of answers, for method.kind: dpo: "
        "preference, ultrafeedback, alpaca_dpo, hh, orca_dpo, sharegpt_dpo, and kto, whose rated "
        "answers are paired where a prompt has a good and a bad one."
    )
    columns: dict[str, Text] = Field(
        default_factory=dict,
        description="Renamed columns, as {field of the format: column of the file}, for example "
        "{instruction: question, output: answer}.",
    )
    ignore_columns: list[Text] = Field(
        default_factory=list,
        description="Columns that are not to be read. A row with a column whose name says that it is part of a prompt "
        "(input, context, system, history, tools, or near one of the format's own) or what was reasoned before an "
        "answer (reasoning, thinking, cot) is refused if the format does not read it and it is not named here.",
    )
    roles: dict[str, Role] = Field(
        default_factory=dict,
        description="What the words that the messages of this data set use for who speaks mean, as {word of the file: "
        "system, user, assistant or tool}, for example {customer: user, agent: assistant}. The usual words (human, "
        "gpt, tool_call, observation, ...) are known without it.",
    )
    response_template: Text | None = Field(
        default=None,
        description="With format: rendered, the text before each answer, for example `[/INST]`; the loss is on what "
        "follows, through response_end. null: only with loss_on: all.",
    )
    response_end: Text | None = Field(
        default=None, description="With response_template, the text that ends an answer; null: the EOS token."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Sampling weight of this data set, relative to the other weights of the list. Either all data sets "
        "of a list have one, or none: then each row is used once per epoch.",
    )
    max_rows: int | None = Field(default=None, ge=1, description="Use only the first max_rows rows; null: all.")


ONE, MANY = "<one>", "<list>"


def _one_or_many(value: Any) -> str:
    # With a plain union pydantic would report the errors of both branches, most of them irrelevant.
    return MANY if isinstance(value, list) else ONE


Sources = Annotated[
    Annotated[DataSource, Tag(ONE)] | Annotated[list[DataSource], Field(min_length=1), Tag(MANY)],
    Discriminator(_one_or_many),
]


class DataSettings(Section):
    """Training and evaluation rows, and how they are tokenised."""

    train: Sources = Field(description="Training data: one data set, or a list of them.")
    eval: Sources | None = Field(
        default=None, description="Evaluation data: one held-out data set, or a list of them; null: no evaluation."
    )
    on_bad_row: Literal["error", "drop"] = Field(
        default="error",
        description="What to do with a row that cannot be used. error: stop before training and list all bad rows; "
        "drop: leave them out, list and count them. A broken file is always an error, and so is a row longer than "
        "max_length with overlong: error.",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="With on_bad_row: drop, the largest allowed share of bad rows in a data set; more is an error.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="With weights, when an epoch ends. first_exhausted: when the first data set is used up, so that no "
        "row is repeated; all_exhausted: when every data set is used up, so that the smaller ones repeat.",
    )
    loss_on: LossOn = Field(
        default="assistant",
        description="Which tokens are in the loss. assistant: every answer of the assistant and its end token; "
        "last_assistant: the last answer of a row; completion: every answer after the last user message; all: every "
        "token, required for format text, and for rendered without response_template. Messages with `train: false` or "
        "`weight: 0` are never supervised. With method.kind: dpo the loss is on the two answers of a pair, and this "
        "stays assistant.",
    )
    system: Literal["error", "merge_into_first_user"] = Field(
        default="error",
        description="What to do with a system message that the chat template rejects. merge_into_first_user: put it "
        "before the first user message, separated by an empty line.",
    )
    max_length: int = Field(
        ge=2,
        description="Maximum length of a row in tokens; for a pair of answers, of the prompt with either answer.",
    )
    overlong: Literal["error", "truncate", "drop", "split"] = Field(
        default="error",
        description="What to do with a row longer than max_length tokens. truncate: cut off its end; split: make it "
        "several rows; drop: leave it out. All are counted. No row is left without supervised tokens. For pairs, "
        "truncate cuts each answer, drop leaves out the pair, and split is not allowed.",
    )
    max_row_characters: int = Field(
        default=1_000_000,
        ge=1000,
        description="Characters of one row's texts, at most; checked before a row is tokenised, whatever `overlong` "
        "says: a tokenizer takes up to 800 bytes of memory for a character of one word.",
    )
    chat_template: PathText | None = Field(
        default=None,
        description="Path of a .jinja file, or the name of a shipped template: chatml, mistral, mistral-v3, "
        "mistral-v3-tekken, mistral-v7, mistral-v7-tekken, mistral-v11, mistral-v13, mistral-v15, alpaca; null: the "
        "tokenizer's own.",
    )
    template_args: dict[str, bool | int | float | str | list[str] | None] = Field(
        default_factory=dict,
        description="Variables for the chat template beside the messages, for example {enable_thinking: false} or "
        "{reasoning_effort: low}, as `chat_template_kwargs` of a server. Recorded with the adapter; the prompts of the "
        "trained model must be rendered with the same ones.",
    )
    train_on_reasoning: bool = Field(
        default=True,
        description="Whether the text of `reasoning_content` (`reasoning`, `thinking`) of a supervised message is in "
        "the loss. false: the model reads it before the answer and learns the answer alone.",
    )
    packing: bool = Field(
        default=False,
        description="Pack several rows into one sequence of at most max_length tokens; rows do not attend to each "
        "other. Pairs of answers are packed into twice that length, in which any pair fits.",
    )

    def sources(self, which: Literal["train", "eval"]) -> tuple[DataSource, ...]:
        """The data sets to train or to evaluate on, in the recipe's order; empty if `eval` is null."""
        given = self.train if which == "train" else self.eval
        if given is None:
            return ()
        return tuple(given) if isinstance(given, list) else (given,)


Scalar = bool | int | float | str | None
Dtype = Literal["float32", "bfloat16", "float16"]
Dashboard = Literal["wandb", "trackio", "tensorboard"]
Recomputation = Literal["none", "selective", "full"]
Scheduler = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]

MAX_RANK = 1024
MAX_SEED = 2**32 - 1


class ModelSettings(Section):
    """The base model and how it is loaded."""

    name_or_path: PathText = Field(description="Folder of a Hugging Face checkpoint, or its name on the hub.")
    revision: Text | None = Field(
        default=None, description="Commit, tag or branch of a checkpoint on the hub; null: its main branch."
    )
    adapter: PathText | None = Field(
        default=None,
        description="Folder of a saved adapter to continue from; for dpo it is also the reference. Its base, "
        "quantization, chat template with its variables, and `lora` section must match. null: a fresh adapter.",
    )
    load_in_4bit: bool = Field(
        description="Store attention and experts as NF4 (4 bits a weight, double quantization) while they load. "
        "Embeddings, router, norms and head keep `dtype`."
    )
    dtype: Dtype = Field(description="Compute dtype, and the dtype of all weights that are not quantized.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa",
        description="Attention implementation of transformers; flash_attention_2 needs its own package and a GPU.",
    )
    added_tokens: list[Text] = Field(
        default=[],
        description="Special tokens that the template needs and the checkpoint's vocabulary lacks. Each gets a row in "
        "the embedding, and in the head if its weights are not tied; these rows start as the mean of the others and "
        "are trained without weight decay. All other rows stay frozen.",
    )
    eos_token: Text | None = Field(
        default=None,
        description="Special token that ends an answer, from the vocabulary or `added_tokens`; null: the "
        "checkpoint's own.",
    )
    pad_token: Text | None = Field(
        default=None,
        description="Special token that fills up batches; null: the tokenizer's own, else its unknown token or its "
        "EOS. Places that are filled up are known by the length of each row, never by this token, so that an EOS is "
        "learned even where both are one.",
    )


class LoraSettings(Section):
    """The adapter. Everything else is frozen."""

    targets: list[Text] = Field(
        description="Modules to adapt: attention, experts, router, mlp (the feed-forward of layers without experts), "
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
        description="Which experts are adapted. all: every expert; auto: before the first step the frozen base is run "
        "on training rows, and in each layer only the experts that matter for them are adapted (ESFT, arXiv "
        "2407.01906); the choice is printed and written to experts.json in the run folder.",
    )
    experts_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Required with experts: auto. In each layer, the smallest set of experts whose scores reach this "
        "share of the layer's sum is adapted; 1: all experts that were used at all. The paper uses 0.1 (gate) and 0.2 "
        "(token) for 64 experts, top 6.",
    )
    experts_score: Literal["gate", "token"] = Field(
        default="gate",
        description="With experts: auto, the score of an expert. gate: its router weight, averaged over all tokens; "
        "token: its share of the tokens' top-k choices.",
    )
    experts_tokens: int = Field(
        default=131072,
        ge=1,
        description="With experts: auto, number of tokens to measure: whole training rows are drawn with `seed` until "
        "it is reached, or all rows. The default is the paper's 32 sequences of 4,096.",
    )
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout probability of the adapter's input. What is dropped follows from `seed`, the optimizer "
        "step, the row, the token's place in it and the part of the model; it does not depend on how a step is split "
        "into micro-batches and processes. Must be 0 with router in `targets`. With experts in `targets` the saved "
        "adapter's config has 0, because stock PEFT rejects any other value; it is not used after training.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (arXiv 2312.03732)."
    )


class RouterSettings(Section):
    """For Mixture-of-Experts models only, and required for them."""

    router_aux_loss_coef: float = Field(
        ge=0,
        description="Weight of the balance loss, E * sum_e f_e P_e (`top_k` when balanced), in the loss that is "
        "minimised; 0 trains without it. The checkpoint's own coefficient is never used.",
    )
    balance: Literal["per_layer", "pooled"] = Field(
        default="per_layer",
        description="per_layer: the balance loss of each layer, averaged. pooled: f and P are averaged over layers "
        "before they are multiplied, as in transformers: layers that collapsed onto different experts then score as "
        "well as balanced ones.",
    )
    scope: Literal["step", "micro_batch"] = Field(
        default="step",
        description="Tokens on which f is counted. step: all tokens of the previous optimizer step; the result does "
        "not depend on how a step is split into micro-batches and processes. micro_batch: those of the micro-batch, "
        "averaged over the step by real tokens (the classic form); its value depends on that split, its strength does "
        "not.",
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
        description="Auxiliary-loss-free balancing (arXiv 2412.19437): after each optimizer step the correction bias "
        "of each expert moves by this much, up if it got fewer tokens than the mean, down if more; 0: off. Only for "
        "routers that have such a bias. The biases are saved beside the adapter and merged with it.",
    )


class TrainingSettings(Section):
    """Length, optimizer and batch sizes. Batch sizes are global: the number of GPUs does not change the result."""

    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps of the run. Exactly one of this and num_train_epochs."
    )
    num_train_epochs: float | None = Field(
        default=None, gt=0, description="Passes over the training rows. Exactly one of this and max_steps."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    global_batch_size: int = Field(ge=1, description="Rows per optimizer step, over all processes and micro-batches.")
    per_device_train_batch_size: int = Field(
        default=1,
        ge=1,
        description="Rows of one micro-batch on one device; must divide global_batch_size.",
    )
    lr_scheduler_type: Scheduler = Field(
        default="cosine",
        description="Learning-rate schedule after the warm-up, by its name in transformers; its own settings are "
        "`lr_scheduler_kwargs` in `trainer_args`, as JSON text.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Optimizer steps of linear warm-up from 0.")
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Decoupled weight decay: a step multiplies a trained weight by 1 - learning_rate * weight_decay.",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Global L2 norm to which gradients are clipped.")
    optim: Text = Field(default="adamw_torch", description="Optimizer, by its name in transformers.")
    gradient_checkpointing: Recomputation = Field(
        default="full",
        description="What is recomputed in the backward pass instead of kept. none: nothing, fastest; selective: all "
        "but the matrix products, attention and experts; full: whole layers, least memory.",
    )
    logging_steps: int = Field(default=1, ge=1, description="Optimizer steps between log lines.")
    eval_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between evaluations on data.eval; null: only at the end."
    )
    save_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps between checkpoints; null: a tenth of the run's steps."
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations in a row that are not better than the best one; needs data.eval "
        "and eval_steps. null: train to the last step. The best checkpoint is kept: RUN@best.",
    )
    resume: PathText = Field(
        default="auto",
        description="auto: start, or continue the run in output_dir from its newest whole checkpoint, or say that it "
        "is finished. never: start anew; an earlier run in output_dir is kept as output_dir.1. Or the path of one of "
        "this run's checkpoints, to go back to it.",
    )
    rank_timeout: int = Field(
        default=300,
        ge=10,
        description="With several processes, seconds that the others wait for one that does not answer before the run "
        "ends.",
    )
    trainer_args: dict[str, Scalar] = Field(
        default_factory=dict,
        description="Further fields of TRL's SFTConfig or DPOConfig, passed on unchanged. Names, types and what they "
        "mean together are checked; fields that the recipe has a key for are rejected.",
    )

    def optimizer_steps(self, sequences: int) -> int:
        """Optimizer steps of the run, as transformers' trainer counts them; `sequences`: those of the training data.

        The last step of an epoch takes the remaining ones.
        """
        per_epoch = math.ceil(sequences / self.global_batch_size)
        return self.max_steps or math.ceil((self.num_train_epochs or 1.0) * per_epoch)

    def steps_between_checkpoints(self, optimizer_steps: int) -> int:
        """`save_steps`, or a tenth of the run's steps, rounded up."""
        return self.save_steps or math.ceil(optimizer_steps / 10)


class LoggingSettings(Section):
    """Where metrics are logged."""

    report_to: list[Dashboard] | Literal["auto", "none"] = Field(
        default="auto", description="Dashboards; auto: wandb where an account is set up, else trackio."
    )
    project: Text = Field(default="moe-finetune", description="Project name in the dashboards.")
    run_name: Text | None = Field(default=None, description="Name of the run; null: the last part of output_dir.")
    wandb_mode: Literal["online", "offline"] = Field(
        default="online", description="offline: W&B writes to the local disk only; upload later with `wandb sync`."
    )


class Recipe(Section):
    """A fine-tuning run: everything that decides its result, and nothing about the machine."""

    output_dir: PathText = Field(
        description="Folder of the run, created at its start; relative to the working directory."
    )
    seed: int = Field(
        default=42,
        ge=0,
        le=MAX_SEED,
        description="Seed of the adapter's initialisation, the order of rows and dropout.",
    )
    model: ModelSettings = Field(description="The base model.")
    lora: LoraSettings = Field(description="The adapter.")
    router: RouterSettings | None = Field(
        default=None, description="The router of a Mixture-of-Experts model; null for dense models."
    )
    method: SftSettings | DpoSettings = Field(
        discriminator="kind", description="The training method. Its keys depend on `kind`."
    )
    data: DataSettings = Field(description="Training and evaluation rows.")
    training: TrainingSettings = Field(description="Length, optimizer and batch sizes.")
    save: SaveSettings = Field(default_factory=SaveSettings, description="Which checkpoints are kept.")
    watchdog: WatchdogSettings = Field(default_factory=WatchdogSettings, description="What is watched in every step.")
    logging: LoggingSettings = Field(default_factory=LoggingSettings, description="The dashboards.")
