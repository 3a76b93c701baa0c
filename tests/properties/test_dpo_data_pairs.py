"""Token pairs, for any prompt and answers: the template's own text, one prompt, exactly the answers' turns supervised.

With Mistral's own tokenizers (v1, v3, tekken) and a tiny byte-level one.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from finetune.data import TokenPair
from finetune.data.render import IGNORED, Renderer, TokenizedText, read_template
from finetune.data.row_errors import RowError
from finetune.data.tokens.examples import PAIRED_ROWS
from finetune.data.tokens.packing import best_fit_decreasing
from finetune.data.tokens.truncation import fit_pair
from finetune.data.types import Conversation, Message, Preference
from finetune.recipe import DataSettings, DataSource
from tests.real_tokenizers import mistral_tokenizer, with_template
from tests.rendering import tool_call, tool_schema
from tests.support import tiny_tokenizer

CASES = [
    ("tiny", "chatml"),
    ("tiny", "alpaca"),
    ("v1", "mistral"),
    ("v3", "mistral-v3"),
    ("tekken", "mistral-v3-tekken"),
]
WITH_TOOLS = ("chatml", "mistral-v3-tekken")
pieces = ["e\u0301", "\u05e9\u05dc", "{{ x }}", "[INST ]", "\r\n", "\n\n", "    ", " the light", "Hello", "1", "é"]
contents = st.lists(st.sampled_from(pieces), min_size=1).map("".join).filter(lambda text: bool(text.strip()))
TOO_SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]
few = settings(deadline=None, max_examples=40, suppress_health_check=TOO_SLOW)


@functools.cache
def tokenizer_of(name: str, template: str) -> Any:
    made: Callable[[], Any] = tiny_tokenizer if name == "tiny" else lambda: mistral_tokenizer(name)
    return with_template(made(), read_template(template))


@functools.cache
def renderer_of(name: str, template: str) -> Renderer:
    return Renderer(tokenizer_of(name, template), template, "assistant", "merge_into_first_user")


def said(role: Any, content: str) -> Message:
    return Message(role=role, content=content)


@st.composite
def answers(draw: st.DrawFn, tools: bool) -> list[Message]:
    """The assistant's, perhaps by way of a tool, perhaps with another question and answer behind it."""
    turns: list[Message] = []
    if tools and draw(st.booleans()):
        call = tool_call("look_up", city=draw(contents), days=draw(st.integers()))
        turns.append(Message(role="assistant", content="", tool_calls=[call]))
        turns.append(Message(role="tool", content=draw(contents), tool_call_id="abcdefghi"))
    turns.append(said("assistant", draw(contents)))
    if not tools and draw(st.booleans()):
        turns += [said("user", draw(contents)), said("assistant", draw(contents))]
    return turns


@st.composite
def preferences(draw: st.DrawFn, tools: bool = False) -> Preference:
    prompt = [said("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [said("user", draw(contents)), said("assistant", draw(contents))]
    prompt.append(said("user", draw(contents)))
    chosen, rejected = draw(answers(tools)), draw(answers(tools))
    assume(chosen != rejected)
    called = any("tool_calls" in message for message in chosen + rejected)
    return Preference(prompt, chosen, rejected, [tool_schema("look_up")] if called else None)


def limit(tokens: int, overlong: Literal["error", "truncate"] = "error") -> DataSettings:
    return DataSettings(train=DataSource(path="a", format="preference"), max_length=tokens, overlong=overlong)


def rendered(renderer: Renderer, preference: Preference) -> tuple[list[str], list[TokenizedText]]:
    """Texts and tokens of both sides; gives up on rows that the template or the tokenizer refuses."""
    try:
        texts = [renderer.render(conversation) for conversation in PAIRED_ROWS.conversations(preference)]
        rows = [row for row in renderer.tokenise(texts) if isinstance(row, TokenizedText)]
    except RowError:
        assume(False)
    assume(len(rows) == 2)
    return [text.text for text in texts], rows


def pair_of(preference: Preference, rows: list[TokenizedText], allowed: DataSettings) -> TokenPair:
    try:
        chosen, rejected = rows
        [pair] = fit_pair(chosen, rejected, allowed, "f:1")
    except RowError as error:
        # Only such as differ in white space that a template or SentencePiece takes away, or by what was cut.
        assert "the same" in error.what or "neither answer" in error.what  # noqa: PT017
        assume(False)
    return pair


@pytest.mark.parametrize(("name", "template"), CASES)
@given(data=st.data())
@few
def test_a_pair_is_what_the_template_renders_and_exactly_its_answers_are_supervised(
    name: str, template: str, data: st.DataObject
) -> None:
    preference = data.draw(preferences(tools=template in WITH_TOOLS))
    tokenizer, renderer = tokenizer_of(name, template), renderer_of(name, template)
    texts, rows = rendered(renderer, preference)
    pair = pair_of(preference, rows, limit(10**6))
    prompt = pair.prompt_ids.tolist()
    if preference.prompt[0]["role"] != "system" or template in ("chatml", "alpaca"):
        given_to_generation = tokenizer.apply_chat_template(
            preference.prompt, tools=preference.tools, add_generation_prompt=True
        )["input_ids"]
        assert prompt == given_to_generation
    for text, (ids, labels), turns in zip(texts, pair.answers, (preference.chosen, preference.rejected), strict=True):
        whole = prompt + ids.tolist()
        assert tokenizer.decode(whole) == text
        assert whole == tokenizer(text, add_special_tokens=False)["input_ids"]
        runs = supervised_runs(ids.tolist(), labels.tolist(), tokenizer.eos_token_id)
        spoken = [turn for turn in turns if turn["role"] == "assistant"]
        assert labels[0] != IGNORED
        assert len(runs) == len(spoken)
        for run, turn in zip(runs, spoken, strict=True):
            assert run[-1] == tokenizer.eos_token_id
            assert run.count(tokenizer.eos_token_id) == 1
            # Behind an end token, because SentencePiece's decoder takes away a space at the very beginning.
            decoded = tokenizer.decode([tokenizer.eos_token_id, *run]).removeprefix(tokenizer.eos_token)
            if "tool_calls" not in turn:
                assert decoded.removesuffix(tokenizer.eos_token).strip() == turn["content"].strip()
            else:
                assert "look_up" in decoded


def supervised_runs(ids: list[int], labels: list[int], eos: int) -> list[list[int]]:
    """The runs of supervised tokens, each cut after its end token; a label is its token or -100."""
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORED, token)
        if label == IGNORED or runs[-1][-1:] == [eos]:
            runs.append([])
        if label != IGNORED:
            runs[-1].append(label)
    return [run for run in runs if run]


@given(preference=preferences(), share=st.floats(0.05, 1))
@few
def test_what_is_cut_is_the_end_of_each_conversation_and_both_keep_something(
    preference: Preference, share: float
) -> None:
    _, rows = rendered(renderer_of("tiny", "chatml"), preference)
    longest = max(len(row.input_ids) for row in rows)
    allowed = limit(max(2, int(share * longest)), "truncate")
    pair = pair_of(preference, rows, allowed)
    for (ids, labels), row in zip(pair.answers, rows, strict=True):
        assert [*pair.prompt_ids.tolist(), *ids.tolist()] == row.input_ids[: allowed.max_length].tolist()
        assert labels.tolist() == row.labels[: allowed.max_length][len(pair.prompt_ids) :].tolist()
        assert (labels != IGNORED).any()
    assert pair.chosen_ids.tolist() != pair.rejected_ids.tolist()


@st.composite
def places(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    """`max_length`, and tokens of prompt, chosen and rejected of pairs that it admits."""
    longest = draw(st.integers(2, 60))
    prompts = draw(st.lists(st.integers(1, longest - 1), min_size=1, max_size=60))
    rest = [longest - prompt for prompt in prompts]
    sizes = [(p, draw(st.integers(1, r)), draw(st.integers(1, r))) for p, r in zip(prompts, rest, strict=True)]
    return longest, sizes


@given(given_places=places(), share=st.booleans())
def test_packed_sequences_hold_every_pair_once_and_never_more_than_fits(
    given_places: tuple[int, list[tuple[int, int, int]]], share: bool
) -> None:
    longest, sizes = given_places
    needed = np.array([p + c + r + 1 if share else 2 * p + c + r for p, c, r in sizes])
    bins = list(best_fit_decreasing(needed, 2 * longest))  # refuses what does not fit
    assert sorted(index for each in bins for index in each) == list(range(len(sizes)))
    assert all(needed[each].sum() <= 2 * longest for each in bins)


def test_the_conversations_of_a_pair_do_not_change_the_row_that_was_read() -> None:
    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    preference = Preference(prompt, [said("assistant", "d")], [said("assistant", "e")])
    first, second = PAIRED_ROWS.conversations(preference)
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert [message.get("train") for message in first.messages] == [None, False, None, None]
    assert all("train" not in message for message in prompt)
    assert [message["content"] for message in second.messages] == ["a", "b", "c", "e"]
