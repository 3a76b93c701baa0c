"""Every text template of the package `trl`: ids and masks are those of an independent oracle, or the row is refused.

tests/unit/template_cases.py says what works with which. The oracle renders with transformers alone.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import pytest

from finetune.data.render import LossOn, Renderer
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from finetune.errors import DataError
from tests.template_oracle import Oracle, check_examples, supervised, tokens_of
from tests.templates import TOKENS, family_tokenizer, trained, trl_template, trl_templates
from tests.unit.template_cases import CALLS, CONVERSATIONS, REASONING, TEMPLATES, Use

LOSSES: tuple[LossOn, ...] = ("assistant", "last_assistant", "completion")  # the last differs where there are calls
SHORT = ("one turn", "three turns", "call", "parallel calls", "reasoning before a call")
# Templates that take contents as lists of images and texts only.
IMAGES_ONLY = {
    "idefics3": "changes the answer",
    "llava_next": "refuses the conversation",
    "smolvlm": "changes the answer",
}
USES = [
    pytest.param(name, use, id=" ".join([name, *(f"{key}={value}" for key, value in use.args.items())]))
    for name, template in TEMPLATES.items()
    for use in template.uses
]


def test_every_template_is_in_the_table() -> None:
    published = {name for name in trl_templates() if not name.endswith("_training")}
    assert published == TEMPLATES.keys() | IMAGES_ONLY.keys()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("name", "use"), USES)
def test_masks_are_those_of_the_oracle(name: str, use: Use, conversation: str) -> None:
    """With the stop tokens of the generation config, and without them: the template alone then says what ends."""
    template, given = TEMPLATES[name], CONVERSATIONS[conversation]
    published = TOKENS[template.tokens].stops
    tried: list[tuple[LossOn, tuple[str, ...]]] = [
        (loss_on, published) for loss_on in (LOSSES if conversation in CALLS else LOSSES[:2])
    ]
    if published and conversation in SHORT:
        tried.append(("assistant", ()))
    for loss_on, stops in tried:
        renderer = _renderer(name, _frozen(use.args), loss_on, stops)
        if refused := use.refused.get(conversation) or use.refused.get(f"{conversation}/{loss_on}"):
            with pytest.raises((DataError, RowError)) as error:
                tokens_of(renderer, renderer.examples(given))
            assert re.search(refused, f"{error.value} {getattr(error.value, 'got', '')}")
        else:
            check_examples(renderer, given, loss_on, _oracle(name, _frozen(use.args), conversation))


@pytest.mark.parametrize(("name", "use"), USES)
def test_answers_are_read_out_of_what_is_generated(name: str, use: Use) -> None:
    """As `finetune evaluate` does: without header words, reasoning and end."""
    chat = _renderer(name, _frozen(use.args), "assistant", TOKENS[TEMPLATES[name].tokens].stops).chat
    for conversation, given in CONVERSATIONS.items():
        if not {conversation, f"{conversation}/assistant"} & use.refused.keys():
            oracle = _oracle(name, _frozen(use.args), conversation)
            for index in supervised(given, "assistant"):
                if "tool_calls" not in given.messages[index]:
                    content = chat.answer_in(oracle.written(index).answer)
                    assert content == given.messages[index]["content"].strip()


@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        (name, conversation)
        for name, template in TEMPLATES.items()
        for conversation in REASONING
        if not {conversation, f"{conversation}/assistant"} & template.uses[0].refused.keys()
    ],
)
def test_reasoning_is_left_out_of_the_loss(name: str, conversation: str) -> None:
    """`data.train_on_reasoning: false`: its text is not supervised, its marks are."""
    template, given = TEMPLATES[name], CONVERSATIONS[conversation]
    use = template.uses[0]
    renderer = Renderer(_tokenizer(name, _frozen(use.args), ()), "its template", train_on_reasoning=False)
    check_examples(renderer, given, "assistant", _oracle(name, _frozen(use.args), conversation), False)


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.uses[0].refused])
def test_a_think_block_in_the_content_is_reasoning(name: str) -> None:
    given = CONVERSATIONS["reasoning in the last answer"]
    *turns, answer = given.messages
    inline = Message(role="assistant", content=f"<think>\n{answer['reasoning']}\n</think>\n\n{answer['content']}")
    renderer = _renderer(name, (), "assistant", TOKENS[TEMPLATES[name].tokens].stops)
    assert renderer.examples(Conversation([*turns, inline])) == renderer.examples(given)


def test_three_turns_become_as_many_examples_as_the_template_needs() -> None:
    found = {}
    for name, template in TEMPLATES.items():
        for use in template.uses:
            renderer = _renderer(name, _frozen(use.args), "assistant", TOKENS[template.tokens].stops)
            found[name, str(use.args)] = len(renderer.examples(CONVERSATIONS["three turns"]))
    assert found == {(name, str(use.args)): use.three_turns for name, one in TEMPLATES.items() for use in one.uses}


@pytest.mark.parametrize("name", IMAGES_ONLY)
def test_a_template_for_images_is_refused(name: str) -> None:
    tokens = {"idefics3": "idefics", "llava_next": "mistral", "smolvlm": "smolvlm"}[name]
    with pytest.raises((DataError, RowError), match=IMAGES_ONLY[name]):
        trained(family_tokenizer(tokens, trl_template(name)), CONVERSATIONS["one turn"])


def _frozen(args: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(args.items())


@functools.cache
def _tokenizer(name: str, args: tuple[tuple[str, Any], ...], stops: tuple[str, ...]) -> Any:
    return family_tokenizer(TEMPLATES[name].tokens, trl_template(name), dict(args), stops)


@functools.cache
def _renderer(name: str, args: tuple[tuple[str, Any], ...], loss_on: LossOn, stops: tuple[str, ...]) -> Renderer:
    return Renderer(_tokenizer(name, args, stops), "its template", loss_on)


@functools.cache
def _oracle(name: str, args: tuple[tuple[str, Any], ...], conversation: str) -> Oracle:
    tokenizer, family = _tokenizer(name, args, ()), TEMPLATES[name].family
    return Oracle(tokenizer, family, dict(args), CONVERSATIONS[conversation])


@pytest.mark.parametrize(
    "name", [name for name, template in TEMPLATES.items() if "call" not in template.uses[0].refused]
)
def test_a_call_without_content_is_written_as_apply_chat_template_writes_null(name: str) -> None:
    tokenizer = family_tokenizer(TEMPLATES[name].tokens, trl_template(name))
    given = CONVERSATIONS["call"]
    question, call = given.messages[0], {**given.messages[1], "content": None}
    theirs = tokenizer.apply_chat_template([question, call], tools=given.tools, tokenize=False)
    ours = Renderer(tokenizer, "its template").chat.text(given.messages[:2], given.tools)
    assert ours == theirs
    assert "None" not in ours
