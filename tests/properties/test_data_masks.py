"""Supervised masks, for any conversation: exactly the answers and their EOS, whatever the script or the line ends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat_templates import read_template
from finetune.data.render import IGNORED, Renderer
from finetune.data.rows import RowError
from finetune.data.types import Conversation, Message
from tests.support import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RENDER = Renderer(TOKENIZER, "chatml")
ALPACA_TOKENIZER = tiny_tokenizer()
ALPACA_TOKENIZER.chat_template = read_template("alpaca")
ALPACA = Renderer(ALPACA_TOKENIZER, "alpaca")

# Emoji with joiners, flags, combining marks, right-to-left with its marks, line ends, words the tokenizer merges, and
# what looks like template syntax or like another template's control words.
EMOJI = ["\U0001f469\u200d\U0001f467", "\U0001f1f3\U0001f1f4", "e\u0301"]
RIGHT_TO_LEFT = ["\u05e9\u05dc\u05d5\u05dd\u200f", "\u0645\u0631\u062d\u0628\u0627"]
pieces = [*EMOJI, *RIGHT_TO_LEFT, "\r\n", "\n\n", "\t", " the kitchen light", "{{ x }}", "{% if %}", "<s>", "[INST]"]
contents = st.one_of(st.text(min_size=1), st.lists(st.sampled_from(pieces), min_size=1).map("".join)).filter(
    lambda text: text.strip() and _is_utf8(text) and not any(token in text for token in TOKENIZER.all_special_tokens)
)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = draw(st.integers(1, 3))
    first = [Message(role="system", content=draw(contents))] if draw(st.booleans()) else []
    for _ in range(turns):
        first += [Message(role="user", content=draw(contents)), Message(role="assistant", content=draw(contents))]
    return Conversation(first)


def supervised_text(render: Renderer, conversation: Conversation) -> tuple[str, str]:
    """The decoded supervised tokens, and what they should be."""
    rendered = render(conversation)
    text = TOKENIZER.decode([label for label in rendered.labels if label != IGNORED])
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    return text, "".join(answer + TOKENIZER.eos_token for answer in answers)


@pytest.mark.parametrize("render", [RENDER, ALPACA], ids=["chatml", "alpaca"])
@given(conversation=conversations())
@settings(deadline=None)
def test_supervised_is_every_answer_with_its_eos_and_nothing_else(render: Renderer, conversation: Conversation) -> None:
    try:
        text, expected = supervised_text(render, conversation)
    except RowError as error:
        # The one way out: white space at an answer's beginning that the tokenizer merges with the prompt's end.
        assert "straddles" in error.what  # noqa: PT017
        assert any(
            message["content"][0].isspace() for message in conversation.messages if message["role"] == "assistant"
        )
        return
    assert text == expected


@given(conversation=conversations())
@settings(deadline=None)
def test_the_first_token_carries_no_loss_so_no_packed_document_predicts_the_next(conversation: Conversation) -> None:
    try:
        assert RENDER(conversation).labels[0] == IGNORED
    except RowError:
        return


@given(conversation=conversations())
@settings(deadline=None)
def test_the_ids_say_the_text_and_generation_sees_the_same_prefix(conversation: Conversation) -> None:
    try:
        rendered = RENDER(conversation)
    except RowError:
        return
    assert TOKENIZER.decode(rendered.input_ids) == rendered.text
    prompt = TOKENIZER.apply_chat_template(conversation.messages[:-1], add_generation_prompt=True)["input_ids"]
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.labels[len(prompt) - 1] == IGNORED
    assert rendered.labels[len(prompt)] != IGNORED
