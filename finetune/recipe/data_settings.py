"""The settings of the rows: where they come from, what of them is supervised, how long they may be."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.config import JsonDict

from finetune.recipe.row_formats import FormatName
from finetune.recipe.section import Section, Text

LossOn = Literal["assistant", "last_assistant", "completion", "all"]

_A_FILE: JsonDict = {"properties": {"path": {"type": "string"}}, "required": ["path"]}
_A_HUB_SET: JsonDict = {"properties": {"id": {"type": "string"}}, "required": ["id"]}


class DataSource(Section):
    """One data set: files, or a set of the hub."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_A_FILE, _A_HUB_SET]})

    path: Text | None = Field(
        default=None,
        description="A file, a glob, or a folder of `datasets.save_to_disk`; relative to the working directory. "
        "JSONL, JSON, CSV, Parquet and Arrow, told by the ending, also with .gz or .zst after it. Exactly one of this "
        "and id.",
    )
    id: Text | None = Field(
        default=None, description="Name of a hub data set, owner/name. Exactly one of this and path."
    )
    config: Text | None = Field(
        default=None, description="With id: the configuration (subset) of the set; null: its only one."
    )
    split: Text = Field(default="train", description="With id: the split of the set.")
    revision: Text | None = Field(
        default=None, description="With id: commit, tag or branch of the set; null: its main branch."
    )
    streaming: bool = Field(
        default=False,
        description="With id: read rows while they are downloaded, and keep no copy of its files; token rows are kept.",
    )
    format: FormatName = Field(
        description="What a row looks like; data/examples/ has a file of each. auto: recognised by the rows' columns, "
        "printed with the reason, an error where two formats fit. Conversations: messages (OpenAI chat, with tools), "
        "sharegpt, alpaca, prompt_completion, dolly, oasst (trees). Documents: text. Pairs of answers, for "
        "method.kind: dpo: preference, ultrafeedback, hh, orca_dpo, sharegpt_dpo, and kto, whose judged answers are "
        "paired where one prompt has a good and a bad one."
    )
    columns: dict[str, Text] = Field(
        default_factory=dict,
        description="Columns that the file names otherwise than the format, as {field of the format: column of the "
        "file}, for example {instruction: question, output: answer}.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Share of this set among the drawn rows, in proportion to the other weights of the list. All sets "
        "of a list have one, or none has: then each row of each set is taken once an epoch.",
    )
    max_rows: int | None = Field(default=None, ge=1, description="Take the first so many rows of the set; null: all.")


ONE, MANY = "<one>", "<list>"


def _one_or_many(value: Any) -> str:
    # With a plain union pydantic would report the mistakes of both branches, most of them nonsense.
    return MANY if isinstance(value, list) else ONE


Sources = Annotated[
    Annotated[DataSource, Tag(ONE)] | Annotated[list[DataSource], Field(min_length=1), Tag(MANY)],
    Discriminator(_one_or_many),
]


class DataSettings(Section):
    """The rows, and how they become token rows."""

    train: Sources = Field(description="What to train on: one data set, or a list of them.")
    eval: Sources | None = Field(
        default=None, description="What to evaluate on: one held-out data set or a list of them; null: no evaluation."
    )
    on_bad_row: Literal["error", "drop"] = Field(
        default="error",
        description="What happens to a row that cannot be used. error: nothing is trained, all bad rows are listed; "
        "drop: they are left out, listed and counted. A broken file is always an error, and so is a "
        "row that overlong: error refuses.",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="With on_bad_row: drop, the greatest share of bad rows among the rows of a data set; more is an "
        "error.",
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="With weights, when an epoch ends. first_exhausted: when the first set is used up, so every set is "
        "cut down to its share and no row comes twice; all_exhausted: when every set is, so the others repeat.",
    )
    loss_on: LossOn = Field(
        default="assistant",
        description="What is supervised. assistant: every answer of the assistant and its end token; last_assistant: "
        "the last answer of a row; completion: every answer after the last user message; all: every token, "
        "which is what format text needs. Messages with `train: false` or `weight: 0` are never supervised. With "
        "method.kind: dpo the loss is on the two answers of a pair, and this stays assistant.",
    )
    system: Literal["error", "merge_into_first_user"] = Field(
        default="error",
        description="What happens to a system message that the chat template refuses. merge_into_first_user: it is "
        "written before the first user message, with an empty line between.",
    )
    max_length: int = Field(
        ge=2,
        description="Greatest length of a row, in tokens; of a pair of answers that of its prompt with either one.",
    )
    overlong: Literal["error", "truncate", "drop", "split"] = Field(
        default="error",
        description="What happens to a row of more than max_length tokens. truncate: its end is cut off; split: it "
        "becomes several rows; drop: it is left out. All are counted. A row is never cut down to one without "
        "supervised tokens. Of a pair either answer is cut, drop leaves out both, and split is refused.",
    )
    chat_template: Text | None = Field(
        default=None,
        description="Path of a .jinja file, or the name of a shipped template: chatml, mistral, mistral-v3, "
        "mistral-v3-tekken, alpaca; null: the tokenizer's own.",
    )
    packing: bool = Field(
        default=False,
        description="Put several rows into one of at most max_length tokens; rows do not see each other. Pairs of "
        "answers share a row of twice as many, in which any pair fits.",
    )

    def sources(self, which: Literal["train", "eval"]) -> tuple[DataSource, ...]:
        """The data sets to train or to evaluate on, in the recipe's order; none where `eval` is null."""
        given = self.train if which == "train" else self.eval
        if given is None:
            return ()
        return tuple(given) if isinstance(given, list) else (given,)
