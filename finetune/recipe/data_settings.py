"""The settings of the data: where rows come from, which tokens are supervised, how long a row may be."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict

from finetune.recipe.row_formats import FormatName
from finetune.recipe.section import Section, Text

LossOn = Literal["assistant", "last_assistant", "completion", "all"]

_A_FILE: JsonDict = {"properties": {"path": {"type": "string"}}, "required": ["path"]}
_A_HUB_SET: JsonDict = {"properties": {"id": {"type": "string"}}, "required": ["id"]}


class DataSource(Section):
    """One data set: local files, or a data set on the hub."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_A_FILE, _A_HUB_SET]})

    path: Text | None = Field(
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
        "sharegpt, alpaca, prompt_completion, dolly, oasst (trees). Documents: text. Pairs of answers, for "
        "method.kind: dpo: preference, ultrafeedback, hh, orca_dpo, sharegpt_dpo, and kto, whose rated answers are "
        "paired where a prompt has a good and a bad one."
    )
    columns: dict[str, Text] = Field(
        default_factory=dict,
        description="Renamed columns, as {field of the format: column of the file}, for example "
        "{instruction: question, output: answer}.",
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
        "token, required for format text. Messages with `train: false` or `weight: 0` are never supervised. With "
        "method.kind: dpo the loss is on the two answers of a pair, and this stays assistant.",
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
    chat_template: Text | None = Field(
        default=None,
        description="Path of a .jinja file, or the name of a shipped template: chatml, mistral, mistral-v3, "
        "mistral-v3-tekken, alpaca; null: the tokenizer's own.",
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
