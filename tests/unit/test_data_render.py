"""Rendering: what is supervised is exactly the answers and their EOS, and a template that prevents it is refused."""

import pytest
from transformers import PreTrainedTokenizerFast

from finetune.data.render import IGNORED, Renderer, read_template
from finetune.data.row_errors import RowError
from finetune.errors import DataError
from tests.rendering import chat, labelled, supervised
from tests.support import tiny_tokenizer


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def mistral_like() -> PreTrainedTokenizerFast:
    """The tiny vocabulary with Mistral's kind of special tokens, and a BOS that the tokenizer adds itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|endoftext|>"
    tokenizer.add_bos_token = True
    tokenizer.chat_template = read_template("mistral")
    return tokenizer


def test_the_answer_and_its_eos_are_supervised_and_the_newline_after_it_is_not() -> None:
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, "own")
    text = renderer.render(chat("turn on the light", "done")).text
    rendered = labelled(renderer, chat("turn on the light", "done"))
    assert text == "<|im_start|>user\nturn on the light<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n"
    assert supervised(tokenizer, rendered) == ["done<|im_end|>"]
    assert rendered.labels[-1] == IGNORED
    assert rendered.labels[-2] == tokenizer.eos_token_id
    assert tokenizer.decode(rendered.input_ids) == text


def test_every_answer_of_a_conversation_is_supervised_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    rendered = labelled(Renderer(tokenizer, "own"), chat("a", "first", "b", "second", system="be brief"))
    assert supervised(tokenizer, rendered) == ["first<|im_end|>", "second<|im_end|>"]


def test_a_label_is_the_token_at_its_own_place_not_the_next_one() -> None:
    rendered = labelled(Renderer(tiny_tokenizer(), "own"), chat("a", "first"))
    pairs = zip(rendered.input_ids, rendered.labels, strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)


def test_what_stands_before_the_answer_is_what_generation_will_see() -> None:
    tokenizer = tiny_tokenizer()
    conversation = chat("a", "first", "b", "second")
    rendered = labelled(Renderer(tokenizer, "own"), conversation)
    prompt = tokenizer.apply_chat_template(conversation.messages[:3], add_generation_prompt=True)["input_ids"]
    assert rendered.input_ids[: len(prompt)].tolist() == prompt
    assert rendered.labels[len(prompt)] != IGNORED


def test_the_template_alone_writes_the_bos_so_there_is_never_a_second_one() -> None:
    tokenizer = mistral_like()
    renderer = Renderer(tokenizer, "mistral")
    rendering = renderer.render(chat("hi", "hello", "more", "yes"))
    rendered = labelled(renderer, chat("hi", "hello", "more", "yes"))
    assert rendering.text == "<|im_start|> [INST] hi [/INST] hello<|endoftext|> [INST] more [/INST] yes<|endoftext|>"
    assert rendered.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert supervised(tokenizer, rendered) == [" hello<|endoftext|>", " yes<|endoftext|>"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_alpaca_supervises_the_response(system: str | None) -> None:
    tokenizer = tokenizer_with(read_template("alpaca"))
    renderer, conversation = Renderer(tokenizer, "alpaca"), chat("Add 1 and 2", "3", "And 4", "7", system=system)
    text, rendered = renderer.render(conversation).text, labelled(renderer, conversation)
    assert text.startswith(system or "Below is an instruction")
    assert "### Instruction:\nAdd 1 and 2\n\n### Response:\n3<|im_end|>\n\n### Instruction:\nAnd 4" in text
    assert supervised(tokenizer, rendered) == ["3<|im_end|>", "7<|im_end|>"]


def test_the_shipped_chatml_is_chatml() -> None:
    conversation = chat("a", "b", system="c")
    own = Renderer(tiny_tokenizer(), "own").render(conversation)
    assert Renderer(tokenizer_with(read_template("chatml")), "chatml").render(conversation) == own


def test_mistral_has_no_system_role_and_says_so() -> None:
    with pytest.raises(RowError) as caught:
        Renderer(mistral_like(), "the chat template mistral").render(chat("hi", "hello", system="be brief"))
    assert str(caught.value.problem("f", 3)) == (
        'f:3: messages[0].role: the chat template mistral has no system role; got "be brief"; set data.system to '
        "merge_into_first_user (--system of evaluate), remove the message, or name another one in data.chat_template"
    )


CHATML = read_template("chatml")
CONTENT = "message['content']"
END_OF_TURN = "'<|im_end|>' + '\\n' -}}"
GENERATION_PROMPT = "'<|im_start|>assistant\\n' -}}"


def changed(old: str, new: str) -> str:
    """ChatML with one thing wrong."""
    assert old in CHATML
    return CHATML.replace(old, new)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template; name one in data.chat_template"),
        (changed(END_OF_TURN, "'\\n' -}}"), "X does not end an answer with the EOS token <|im_end|>; got"),
        (changed(GENERATION_PROMPT, "'<|im_start|>bot\\n' -}}"), "X renders what comes before an answer differently"),
        (
            changed(CONTENT, f"({CONTENT} if message.role != 'user' else '')"),
            "X drops or changes the content of the user message; got",
        ),
        (changed(CONTENT, CONTENT + " | upper"), "X changes the answer or writes its own words into it; got"),
        (changed(CONTENT, CONTENT + " + '!'"), "X changes the answer or writes its own words into it; got"),
        ("{{ messages[0]['content'] ", "X cannot be read; got unexpected end of template"),
        ("{{ messages | length + eos_token }}", "X refuses the conversation; got unsupported operand type"),
    ],
)
def test_a_template_that_cannot_work_is_refused_by_name_before_any_row(template: str | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer_with(template), "X")
    assert str(caught.value).startswith(f"data.chat_template: {message}")


DIFFERENTLY = "X renders what comes before an answer differently once the answer is there"


def said_of(template: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer_with(template), "X", "last_assistant")
    return str(caught.value).split("\n")


def test_a_prompt_that_no_loss_on_would_mend_gets_no_advice_to_set_it() -> None:
    assert said_of(changed(GENERATION_PROMPT, "'<|im_start|>assistant\\n<aside>\\n' -}}")) == [
        f"data.chat_template: {DIFFERENTLY}: only generation is given "
        r'"<aside>\n"; got "t is 2+2?<|im_end|>\n<|im_start|>assistant\n<aside>\n"; name another one in '
        "data.chat_template"
    ]


def test_all_problems_of_a_template_are_listed_at_once() -> None:
    template = changed(GENERATION_PROMPT, "'<|im_start|>bot\\n' -}}").replace("<|im_end|>", "")
    assert [line.partition("; got ")[0] for line in said_of(template.replace(CONTENT, CONTENT + " + '!'"))] == [
        f'data.chat_template: {DIFFERENTLY}: only generation is given "bot\\n"',
        "data.chat_template: X does not end an answer with the EOS token <|im_end|>",
        "data.chat_template: X changes the answer or writes its own words into it",
    ]


def test_what_a_template_writes_behind_the_end_of_an_answer_is_not_learned() -> None:
    renderer = Renderer(tokenizer_with(changed(END_OF_TURN, "'<|im_end|> thanks' -}}")), "X")
    [first] = renderer.examples(chat("a", "b", "c", "d"))
    assert [first.text[answer.start : answer.end] for answer in first.answers] == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_may_end_answers_with_another_token_than_the_eos() -> None:
    renderer = Renderer(tokenizer_with(changed("<|im_end|>", "<|pad|>")), "X")
    assert renderer.chat.end_tokens == ("<|pad|>",)
    assert supervised(renderer._tokenizer, labelled(renderer, chat("a", "b"))) == ["b<|pad|>"]


def test_a_template_that_rewrites_earlier_answers_makes_an_example_of_each() -> None:
    thinking = "('<think>' if loop.last and message.role == 'assistant' else '')"
    template = changed("+ '\\n' + message", f"+ '\\n' + {thinking} + message")
    template = template.replace("assistant\\n", "assistant\\n<think>")
    renderer = Renderer(tokenizer_with(template), "X")
    conversation = chat("a", "b", "c", "d")
    assert [example.text.count("<think>") for example in renderer.examples(conversation)] == [1, 1]
    assert renderer.examples(chat("a", "b"))[0].text.endswith("<|im_start|>assistant\n<think>b<|im_end|>\n")
    for loss_on in ("last_assistant", "completion"):
        [example] = Renderer(tokenizer_with(template), "X", loss_on).examples(conversation)
        assert example.text == renderer.examples(conversation)[1].text
    with pytest.raises(RowError, match="X rewrites earlier answers, and two answers are compared in one text each"):
        renderer.render(conversation)
    with pytest.raises(
        RowError, match="X renders what comes before an answer differently once the answer is"
    ) as caught:
        Renderer(tokenizer_with(template), "X", "all").examples(conversation)
    advice = "name another one in data.chat_template, or with method.kind: sft set data.loss_on to "
    assert caught.value.do == f"{advice}assistant or last_assistant or completion"


def test_a_template_that_drops_the_system_message_is_refused_for_a_row_that_has_one() -> None:
    template = changed("in messages -%}", "in messages if message.role != 'system' -%}")
    with pytest.raises(RowError, match="X has no system role"):
        Renderer(tokenizer_with(template), "X").render(chat("a", "b", system="be brief"))


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|pad|>"])
def test_a_control_token_inside_a_content_would_forge_a_turn_and_is_refused(token: str) -> None:
    with pytest.raises(RowError) as caught:
        Renderer(tiny_tokenizer(), "own").render(chat(f"a {token} b", "c"))
    assert str(caught.value.problem("f", 1)).startswith(
        f"f:1: messages[0].content: contains the control token {token}, which would be read as "
    )


def test_a_token_that_straddles_the_border_to_the_answer_is_refused() -> None:
    template = changed("'\\n' + message", "('\\nth' if message.role == 'assistant' else '\\n') + message")
    renderer = Renderer(tokenizer_with(template.replace("assistant\\n'", "assistant\\nth'")), "X")
    with pytest.raises(RowError) as caught:
        labelled(renderer, chat("a", "e light"))
    assert str(caught.value.problem("f", 1)) == (
        "f:1: messages[1].content: a token straddles the border between prompt and answer, so generation would begin "
        'differently; got "he"; remove the white space at the answer\'s beginning, or name another one in '
        "data.chat_template"
    )


def test_an_empty_system_message_is_left_out_unless_the_template_writes_a_text_of_its_own_without_one() -> None:
    plain, empty = chat("hi", "hello"), chat("hi", "hello", system="")
    for tokenizer in (tokenizer_with(CHATML), mistral_like()):
        renderer = Renderer(tokenizer, "the chat template")
        assert renderer.render(empty).text == renderer.render(plain).text
        assert [answer.message for answer in renderer.render(empty).answers] == [2]
    first = "{%- if messages[0]['role'] != 'system' -%}<|im_start|>system\nYou are kind.<|im_end|>\n{%- endif -%}"
    renderer = Renderer(tokenizer_with(first + CHATML), "the chat template")
    assert "You are kind." in renderer.render(plain).text
    assert renderer.render(empty).text.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>")
