"""Reasoning in chat templates: where it comes from, what of it is learned, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.data import load_tokenizer, prepare, prepare_pair_mixture
from finetune.data.render import IGNORED, LossOn, Renderer, set_template_args
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from finetune.errors import DataError, RecipeError
from finetune.recipe import DataSettings, DataSource
from tests.rendering import chat, labelled, supervised
from tests.support import tiny_tokenizer

TURNS = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
HYBRID = (
    TURNS + "{%- if m.role == 'assistant' and loop.last -%}"
    "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content.split('</think>')[-1] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
"""As Qwen3's: a block of reasoning in the last answer only, and a variable that closes it in the prompt."""

OPENED = (
    TURNS + "{{- m.content.split('</think>')[-1] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)
"""As DeepSeek-R1's: the prompt opens a block that the finished text never has."""

SWITCHED = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + ('</think>' if m.role == 'assistant' else '') -}}"
    "{{- m.content.split('</think>')[-1] + '<|im_end|>' -}}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant' + ('<think>' if thinking else '</think>') -}}{%- endif -%}"
)
"""As DeepSeek-V3.1's: closed unless `thinking` is true."""


def renderer(
    source: str, args: dict[str, Any] | None = None, loss_on: LossOn = "assistant", train_on_reasoning: bool = True
) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    set_template_args(tokenizer, args or {})
    return Renderer(tokenizer, "X", loss_on, train_on_reasoning=train_on_reasoning)


def reasoned(content: str = "4", reasoning: str = "2 + 2") -> Conversation:
    answer = Message(role="assistant", content=content, reasoning=reasoning)
    return Conversation([Message(role="user", content="What is 2+2?"), answer])


def learned(given: Renderer, conversation: Conversation) -> list[list[str]]:
    """The supervised texts of each example."""
    tokens = given.tokenise(given.examples(conversation))
    return [supervised(given._tokenizer, row) for row in tokens if not isinstance(row, RowError)]


def test_the_block_of_reasoning_is_learned_as_the_template_writes_it() -> None:
    assert learned(renderer(HYBRID), reasoned()) == [["<think>\n2 + 2\n</think>\n\n4<|im_end|>"]]
    assert learned(renderer(HYBRID), chat("a", "b")) == [["<think>\n\n</think>\n\nb<|im_end|>"]]
    assert learned(renderer(HYBRID, {"enable_thinking": False}), chat("a", "b")) == [["b<|im_end|>"]]


def test_a_block_that_the_prompt_opened_is_filled_and_closed() -> None:
    assert learned(renderer(OPENED), reasoned()) == [["2 + 2\n</think>\n\n4<|im_end|>"]]
    assert learned(renderer(OPENED), chat("a", "b")) == [["\n</think>\n\nb<|im_end|>"]]
    assert learned(renderer(SWITCHED, {"thinking": True}), reasoned()) == [["2 + 2</think>4<|im_end|>"]]
    assert learned(renderer(SWITCHED), chat("a", "b")) == [["b<|im_end|>"]]


@pytest.mark.parametrize("source", [HYBRID, OPENED])
def test_a_block_within_the_answer_is_its_reasoning(source: str) -> None:
    for content in ("<think>\n2 + 2\n</think>\n\n4", "2 + 2\n</think>\n4", "\n<think>2 + 2</think>4"):
        assert learned(renderer(source), chat("What is 2+2?", content)) == learned(renderer(source), reasoned())
    assert learned(renderer(source), chat("What is 2+2?", "<think>\n\n</think>\n\n4")) == learned(
        renderer(source), chat("What is 2+2?", "4")
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (reasoned("<think>x</think>4"), "messages[1].content: has another <think> block than its reasoning; got"),
        (chat("a", "So <think>x</think>4"), "messages[1].content: has text before its <think> block; got"),
        (chat("a", " <think>x, and"), "messages[1].content: opens a <think> block and does not close it; got"),
        (chat("a", "<think>x</think>4</think>"), "messages[1].content: has more than one <think> block; got"),
        (
            reasoned("4", "a </think> b"),
            "messages[1].reasoning: contains <think> or </think>, which the template writes itself; got",
        ),
        (chat("a", "<think>x</think>"), "messages[1].content: has reasoning and no answer; got"),
    ],
)
def test_blocks_that_are_no_reasoning_before_an_answer_are_refused(given: Conversation, message: str) -> None:
    with pytest.raises(RowError) as caught:
        renderer(HYBRID).examples(given)
    assert str(caught.value.problem("f", 1)).startswith(f"f:1: {message}")


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        (
            SWITCHED,
            {},
            'X drops the reasoning of this answer; got "2 + 2"; write data.template_args: {thinking: true}, or remove '
            "it from the row, or name another one in data.chat_template",
        ),
        (
            HYBRID,
            {"enable_thinking": False},
            'has reasoning, and the generation prompt closes the block for it; got "2 + 2"; remove it from the row, or '
            "change data.template_args (enable_thinking: false)",
        ),
        (
            TURNS + "{{- m.content + '<|im_end|>' -}}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
            {},
            'X drops the reasoning of this answer; got "2 + 2"; remove it from the row, or name another one in '
            "data.chat_template",
        ),
    ],
)
def test_reasoning_that_would_not_be_learned_is_refused(source: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        renderer(source, args).examples(reasoned())
    assert str(caught.value.problem("f", 1)) == f"f:1: messages[1].reasoning: {message}"


def test_the_advised_variable_lets_the_reasoning_in() -> None:
    name, value = renderer(SWITCHED).chat.opening_arg or ("", False)
    assert learned(renderer(SWITCHED, {name: value}), reasoned()) == [["2 + 2</think>4<|im_end|>"]]
    assert renderer(SWITCHED, {"thinking": True}).chat.closing_arg == ("thinking", False)
    assert renderer(HYBRID).chat.closing_arg is None, "its prompt opens nothing"


def test_reasoning_can_be_read_without_being_learned() -> None:
    assert learned(renderer(HYBRID, train_on_reasoning=False), reasoned()) == [
        ["<think>\n", "\n</think>\n\n4<|im_end|>"]
    ]
    assert learned(renderer(OPENED, train_on_reasoning=False), reasoned()) == [["\n</think>\n\n4<|im_end|>"]]


def test_earlier_reasoning_is_what_generation_is_given() -> None:
    turns = [*reasoned().messages, *chat("b", "c").messages]
    first, second = renderer(HYBRID).examples(Conversation(turns))
    assert "2 + 2" in first.text
    assert "2 + 2\n" not in second.text
    assert second.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>\n")


def test_the_tokens_of_the_prompt_are_those_that_generation_is_given() -> None:
    """GPT-2's tokenizer, and many after it, reads two line breaks as one token."""
    given = renderer(OPENED)
    [example] = given.examples(chat("a", "b"))
    prompt = given.chat.text(chat("a").messages, generation=True)
    ids = given._tokenizer(prompt, add_special_tokens=False)["input_ids"]
    row = labelled(given, chat("a", "b"))
    assert row.input_ids.tolist()[: len(ids)] == ids
    assert (row.labels[: len(ids)] == -100).all()
    assert (row.labels[len(ids) :] != -100).sum() > 0
    assert example.answers[0].alone


@pytest.mark.parametrize(
    ("source", "generated"),
    [
        (HYBRID, "<think>\n\n</think>\n\n4<|im_end|>"),
        (HYBRID, "<think>\nso\n</think>\n\n4"),
        (HYBRID, "4"),
        (OPENED, "so\n</think>\n\n4<|im_end|>\n<|im_start|>user"),
    ],
)
def test_the_answer_is_found_in_what_a_model_wrote(source: str, generated: str) -> None:
    assert renderer(source).chat.answer_in(generated) == "4"


def settings(path: Path, **more: Any) -> DataSettings:
    source = DataSource(path=str(path), format="messages")
    return DataSettings(**{"train": source, "max_length": 200, "chat_template": None, **more})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """One conversation of three answers, the last of them long."""
    messages = [dict(message) for message in chat("a", "b", "c", "d", "e", "turn on the light " * 12).messages]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    return path


def test_a_split_conversation_is_counted_and_said(rows: Path) -> None:
    given = settings(rows)
    prepared = prepare(given.sources("train"), renderer(HYBRID)._tokenizer, given, 0)
    assert len(prepared.dataset) == 3
    assert prepared.dataset["row"] == [f"{rows}:1"] * 3
    said = "1 conversation became 3 examples, because the chat template rewrites earlier answers"
    assert f"  {rows}: {said}" in prepared.stats.lines()
    assert prepared.stats.sets[0].source.without_reasoning == 3


@pytest.mark.parametrize(("overlong", "kept"), [("drop", 2), ("truncate", 3), ("split", 3)])
def test_an_example_that_is_too_long_does_not_take_the_others_with_it(rows: Path, overlong: str, kept: int) -> None:
    given = settings(rows, max_length=80, overlong=overlong)
    prepared = prepare(given.sources("train"), renderer(HYBRID)._tokenizer, given, 0)
    assert len(prepared.dataset) >= kept
    left_out = prepared.stats.sets[0].source.examples_left_out
    assert left_out == (1 if overlong == "drop" else 0)
    assert any("1 of these examples" in line for line in prepared.stats.lines()) == bool(left_out)


def test_an_example_that_is_too_long_is_an_error_where_the_recipe_says_so(rows: Path) -> None:
    given = settings(rows, max_length=60)
    with pytest.raises(DataError, match=r"longer than data\.max_length = 60 tokens"):
        prepare(given.sources("train"), renderer(HYBRID)._tokenizer, given, 0)


def test_other_variables_are_other_rows(rows: Path) -> None:
    given = settings(rows)
    lengths = [
        len(prepare(given.sources("train"), renderer(HYBRID, args)._tokenizer, given, 0).dataset[0]["labels"])
        for args in ({}, {"enable_thinking": False})
    ]
    supervised_counts = [
        prepare(given.sources("train"), renderer(HYBRID, args)._tokenizer, given, 0).stats.supervised_tokens
        for args in ({}, {"enable_thinking": False})
    ]
    assert lengths[0] == lengths[1], "the same text"
    assert supervised_counts[0] > supervised_counts[1]


def test_two_answers_may_differ_in_reasoning_that_is_not_learned(tmp_path: Path) -> None:
    """The prompt of a pair ends where the answers begin, and not where the loss does."""
    turns = [
        {"role": "assistant", "content": content, "reasoning_content": reasoning}
        for content, reasoning in (("4", "2 + 2"), ("5", "a guess"))
    ]
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": turns[:1], "rejected": turns[1:]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    tokenizer = renderer(OPENED)._tokenizer
    for learn in (True, False):
        source = DataSource(path=str(tmp_path / "pairs.jsonl"), format="preference")
        given = DataSettings(train=source, max_length=200, chat_template=None, train_on_reasoning=learn)
        [pair] = prepare_pair_mixture(given.sources("train"), tokenizer, given, 0).table
        assert tokenizer.decode(pair.prompt_ids).endswith("assistant\n<think>\n")
        assert tokenizer.decode(pair.rejected_ids).startswith("a guess\n</think>\n\n5")
        kept = [token for token, label in zip(pair.chosen_ids, pair.chosen_labels, strict=True) if label != IGNORED]
        assert tokenizer.decode(kept) == ("2 + 2" if learn else "") + "\n</think>\n\n4<|im_end|>"


PLAIN = (
    TURNS + "{{- m.content + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""Knows no reasoning."""


def test_a_block_is_part_of_the_text_where_the_template_knows_no_reasoning() -> None:
    given = chat("a", "<think>\nso\n</think>\n\n4")
    assert learned(renderer(PLAIN), given) == [["<think>\nso\n</think>\n\n4<|im_end|>"]]
    without = renderer(PLAIN, train_on_reasoning=False)
    assert learned(without, given) == [["<think>\n", "\n</think>\n\n4<|im_end|>"]]


@pytest.mark.parametrize(("content", "reasoning"), [("Yes", "Yes"), ("I look it up.", "look"), ("No, 7.", "No")])
def test_reasoning_is_not_taken_for_the_answer_that_says_the_same(content: str, reasoning: str) -> None:
    given = reasoned(content, reasoning)
    assert learned(renderer(HYBRID), given) == [[f"<think>\n{reasoning}\n</think>\n\n{content}<|im_end|>"]]
    assert learned(renderer(OPENED), given) == [[f"{reasoning}\n</think>\n\n{content}<|im_end|>"]]
    with pytest.raises(RowError, match="X drops the reasoning of this answer"):
        renderer(PLAIN).examples(given)


def test_a_block_that_repeats_the_reasoning_is_the_reasoning() -> None:
    assert learned(renderer(HYBRID), reasoned("<think>2 + 2</think>4")) == learned(renderer(HYBRID), reasoned())


def test_a_tokenizer_with_several_templates_and_no_default_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer, "X")
    assert str(caught.value) == (
        "data.chat_template: the tokenizer has several chat templates, and none is called default; got rag, tool_use; "
        "give one of them as a .jinja file in data.chat_template"
    )


def test_a_word_for_false_is_not_taken_for_true() -> None:
    with pytest.raises(RecipeError) as caught:
        renderer(HYBRID, {"enable_thinking": "no"})
    assert str(caught.value) == (
        'data.template_args.enable_thinking: is text, which a template takes for true; got "no"; write true or false, '
        "without quotes"
    )


def test_the_length_that_would_do_is_that_of_the_longest_example(rows: Path) -> None:
    given = settings(rows, max_length=60)
    with pytest.raises(DataError) as caught:
        prepare(given.sources("train"), renderer(HYBRID)._tokenizer, given, 0)
    [tokens] = map(int, re.findall(r"got (\d+) tokens", str(caught.value)))
    longer = settings(rows, max_length=tokens)
    assert len(prepare(longer.sources("train"), renderer(HYBRID)._tokenizer, longer, 0).dataset) == 3


def test_two_answers_that_differ_only_in_reasoning_are_no_pair_where_it_is_not_learned(tmp_path: Path) -> None:
    turns = [[{"role": "assistant", "content": "4", "reasoning_content": text}] for text in ("2 + 2", "a guess")]
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": turns[0], "rejected": turns[1]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    source = DataSource(path=str(tmp_path / "pairs.jsonl"), format="preference")
    given = DataSettings(train=source, max_length=200, chat_template=None, train_on_reasoning=False)
    with pytest.raises(DataError, match=r"they differ only in what is not learned; remove the row: .* true"):
        prepare_pair_mixture(given.sources("train"), renderer(HYBRID)._tokenizer, given, 0)


def test_a_template_that_refuses_a_variable_names_it() -> None:
    asking = "{%- if persona is not defined -%}{{- raise_exception('persona is required') -}}{%- endif -%}" + PLAIN
    with pytest.raises(DataError, match=r"persona is required; give persona in data\.template_args, or name"):
        renderer(asking)
    assert learned(renderer(asking, {"persona": "Bob"}), chat("a", "b")) == [["b<|im_end|>"]]


def test_an_end_that_the_vocabulary_lacks_is_named_and_can_be_added(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN.replace("<|im_end|>", "<|stop|>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r'write model\.added_tokens: \["<\|stop\|>"\] and model\.eos_token: "<\|stop\|>"'
    ):
        Renderer(load_tokenizer(str(tmp_path), None, None), "X")
    mended = load_tokenizer(str(tmp_path), None, None, ["<|stop|>"], "<|stop|>")
    assert learned(Renderer(mended, "X"), chat("a", "b")) == [["b<|stop|>"]]
