"""Which turns are supervised, what a system message becomes, and documents without turns."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.data.render import IGNORED, LossOn, Renderer, read_template
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Document, Message
from finetune.errors import DataError
from tests.rendering import chat, labelled, supervised, weather
from tests.support import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def with_template(name: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template(name)
    return tokenizer


CHATML, MISTRAL = with_template("chatml"), with_template("mistral")


def row_error(renderer: Renderer, example: Conversation | Document) -> str:
    with pytest.raises(RowError) as caught:
        labelled(renderer, example)
    return str(caught.value.problem("f", 1))


CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3, "wind": true}}\n</tool_call>'
FOLLOWED_UP = Conversation([*chat("a", "first").messages, *weather().messages], weather().tools)


@pytest.mark.parametrize(
    ("loss_on", "texts"),
    [
        ("assistant", ["first", CALL, "It is warm."]),
        ("last_assistant", ["It is warm."]),
        ("completion", [CALL, "It is warm."]),
    ],
)
def test_loss_on_names_the_turns_a_call_among_them_and_a_result_never(loss_on: LossOn, texts: list[str]) -> None:
    rendered = labelled(Renderer(CHATML, "chatml", loss_on), FOLLOWED_UP)
    assert supervised(CHATML, rendered) == [text + "<|im_end|>" for text in texts]


def test_loss_on_all_leaves_out_the_first_token_only() -> None:
    rendered = labelled(Renderer(CHATML, "chatml", "all"), FOLLOWED_UP)
    assert rendered.labels.tolist() == [IGNORED, *rendered.input_ids.tolist()[1:]]


def marked(index: int, train: bool) -> Conversation:
    """Two questions with answers, one turn marked."""
    messages = chat("a", "first", "b", "second", system="c").messages
    messages[index] = {**messages[index], "train": train}
    return Conversation(messages)


QUESTION = Message(role="user", content="a", train=False)
SILENT = Conversation([QUESTION, Message(role="assistant", content="b", train=False)])


@pytest.mark.parametrize("train", [True, False])
def test_a_turn_with_train_false_is_not_supervised(train: bool) -> None:
    rendered = labelled(Renderer(CHATML, "chatml"), marked(2, train))
    assert supervised(CHATML, rendered) == ["first<|im_end|>"] * train + ["second<|im_end|>"]


@pytest.mark.parametrize(("index", "hole"), [(0, "system\nc"), (1, "user\na"), (2, "assistant\nfirst")])
def test_under_all_a_turn_with_train_false_is_left_out_with_its_frame(index: int, hole: str) -> None:
    rendered = labelled(Renderer(CHATML, "chatml", "all"), marked(index, False))
    frame = f"<|im_start|>{hole}<|im_end|>\n"
    whole = CHATML.decode(rendered.input_ids)
    left = CHATML.decode([x for x in rendered.labels.tolist() if x != IGNORED])
    start = "" if index == 0 else "<|im_start|>"  # the first token is left out anyway
    assert start + left == whole.replace(frame, "")


def test_a_template_never_sees_the_mark_itself() -> None:
    tokenizer = tiny_tokenizer()
    turn = "{{ m.keys() | join('+') + ':' + m.content + eos_token }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}role+content:{% endif %}"
    text = Renderer(tokenizer, "keys").render(marked(4, True)).text
    assert text.endswith("role+content:b<|im_end|>role+content:second<|im_end|>")


@pytest.mark.parametrize(
    ("loss_on", "conversation"),
    [
        ("last_assistant", marked(4, False)),
        ("completion", marked(4, False)),
        ("assistant", SILENT),
    ],
)
def test_a_row_without_a_supervised_token_is_refused(loss_on: LossOn, conversation: Conversation) -> None:
    message = row_error(Renderer(CHATML, "chatml", loss_on), conversation)
    assert message.startswith(f"f:1: messages: nothing is supervised: data.loss_on is {loss_on}; got [")
    assert "assistant (train: false)" in message
    assert message.endswith("; remove the row, or supervise one of its turns")


def test_under_all_too() -> None:
    assert "nothing is supervised: data.loss_on is all" in row_error(Renderer(CHATML, "chatml", "all"), SILENT)


def test_a_system_message_goes_before_the_first_question_where_the_template_has_no_role_for_it() -> None:
    merging = Renderer(MISTRAL, "mistral", system="merge_into_first_user")
    text = merging.render(chat("hi", "hello", "more", "yes", system="Be brief.\n")).text
    assert text == " [INST] Be brief.\n\n\nhi [/INST] hello<|im_end|> [INST] more [/INST] yes<|im_end|>"
    own = Renderer(CHATML, "chatml", system="merge_into_first_user").render(chat("hi", "hello", system="Be brief."))
    assert own.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<")


def test_with_a_merged_system_message_places_are_still_those_of_the_row() -> None:
    merging = Renderer(MISTRAL, "mistral", system="merge_into_first_user")
    assert [answer.message for answer in merging.render(chat("a", "b", "c", "d", system="s")).answers] == [2, 4]
    assert row_error(merging, chat("a", "b <|im_end|>", system="s")).startswith("f:1: messages[2].content: contains")
    alone = Conversation([Message(role="system", content="s"), Message(role="assistant", content="b")])
    assert row_error(merging, alone) == (
        "f:1: messages[0].role: no user message follows to take the system message; let a user message follow, or "
        "remove it"
    )


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_merged_into_a_turn_not_to_be_trained_or_is_not_itself_is_left_out(index: int) -> None:
    messages = chat("hi", "hello", system="Be brief.").messages
    messages[index] = {**messages[index], "train": False}
    rendered = labelled(Renderer(MISTRAL, "mistral", "all", "merge_into_first_user"), Conversation(messages))
    assert supervised(MISTRAL, rendered) == [" hello<|im_end|>"]


class WithBos:
    """Tokenizers that put a BOS before a text themselves, and such that do not."""

    plain = TOKENIZER

    @staticmethod
    def adding() -> Any:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer().backend_tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            add_bos_token=True,
        )
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return tokenizer


def test_a_document_is_its_text_and_an_end_token_behind_the_tokenizers_own_bos() -> None:
    for tokenizer in (WithBos.plain, WithBos.adding()):
        tokenizer.chat_template = None
        rendered = labelled(Renderer(tokenizer, "none", "all"), Document("turn on the light"))
        assert rendered.input_ids.tolist() == [*tokenizer("turn on the light")["input_ids"], tokenizer.eos_token_id]
        assert rendered.labels.tolist() == [IGNORED, *rendered.input_ids.tolist()[1:]]
        with pytest.raises(DataError, match=r"the tokenizer has no chat template; name one in data.chat_template"):
            Renderer(tokenizer, "none", "all").render(chat("a", "b"))


def test_a_document_needs_loss_on_all_and_no_end_token_inside() -> None:
    assert row_error(Renderer(CHATML, "chatml"), Document("a")) == (
        "f:1: text: plain text has no answer, and data.loss_on is assistant; set data.loss_on to all, or name a format "
        "with turns in the source"
    )
    message = row_error(Renderer(CHATML, "chatml", "all"), Document("a<|im_end|>b"))
    assert message.startswith("f:1: text: contains the control token <|im_end|>, which would be read as such; got ")
