"""Rows that are no pair to train on: each one line, with file, line, the file's own field, what, got and do."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import prepare
from finetune.data.render import Renderer, Rendering
from finetune.data.row_errors import RowError
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource
from tests.pairs import LONG, SHORT, prepare_pairs, prepared, refusal, write_rows
from tests.support import CHATML, tiny_tokenizer

REMOVE = "remove the row: it does not say which answer is better"
FRAME = "which would be read as the conversation's frame"
RAISE = "raise data.max_length, shorten the row, or set data.overlong to truncate or drop"
OR_DROP = "raise data.max_length, or set data.overlong to drop"
TURNS = [{"role": "user", "content": "set the timer"}, {"role": "assistant", "content": "done"}]
ANOTHER = [{"role": "user", "content": "dim the light"}, {"role": "assistant", "content": "no"}]
SHAREGPT = {
    "conversations": [{"from": "human", "value": "a"}],
    "chosen": {"from": "gpt", "value": "b"},
    "rejected": {"from": "gpt", "value": "c"},
}
FORGED = "b <|im_end|>"


def stripping() -> Any:
    """A tokenizer whose template takes the white space around contents away, as Llama's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    return tokenizer


@pytest.mark.parametrize(
    ("row_format", "row", "line"),
    [
        pytest.param(
            "preference",
            {**SHORT, "rejected": "done"},
            f"rejected: is the same answer as chosen; {REMOVE}",
            id="the same answer twice",
        ),
        pytest.param(
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            f"rejected: is the same answer as chosen; {REMOVE}",
            id="the same transcript twice",
        ),
        pytest.param(
            "preference",
            {**SHORT, "chosen": " \n"},
            'chosen: is empty; got " \\n"; remove the row or fill it in',
            id="an empty answer",
        ),
        pytest.param(
            "sharegpt_dpo",
            {**SHAREGPT, "rejected": {"from": "gpt", "value": ""}},
            'rejected.value: is empty; got ""; remove the row or fill it in',
            id="an empty answer that is a turn",
        ),
        pytest.param(
            "preference",
            {"prompt": "set the timer", "chosen": TURNS, "rejected": ANOTHER},
            "prompt: is not what chosen and rejected begin with; write the same prompt three times, or remove this one",
            id="another prompt than the column's",
        ),
        pytest.param(
            "preference",
            {"chosen": TURNS, "rejected": ANOTHER},
            'rejected: does not begin with the same message as chosen, so there is no prompt; got "dim the light"; '
            "add the prompt to both",
            id="two prompts",
        ),
        pytest.param(
            "hh",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            'rejected: does not begin with the same message as chosen, so there is no prompt; got "c"; '
            "add the prompt to both",
            id="two prompts in transcripts",
        ),
        pytest.param(
            "preference",
            {"chosen": [*TURNS, *TURNS], "rejected": [*TURNS, *ANOTHER]},
            'chosen[2].role: an answer must begin with the assistant; got ["user", "assistant"]; '
            "move what precedes it to the prompt",
            id="prompts that part later",
        ),
        pytest.param(
            "preference",
            {**SHORT, "prompt": [{"role": "user", "content": FORGED}], "chosen": "x"},
            f'prompt[0].content: contains the control token <|im_end|>, {FRAME}; got "{FORGED}"; '
            "remove it or write it differently",
            id="a control token in the prompt",
        ),
        pytest.param(
            "preference",
            {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": FORGED}]},
            f'rejected[1].content: contains the control token <|im_end|>, {FRAME}; got "{FORGED}"; '
            "remove it or write it differently",
            id="a control token in the rejected answer",
        ),
        pytest.param(
            "orca_dpo",
            {"question": "a", "chosen": FORGED, "rejected": "c"},
            f'chosen: contains the control token <|im_end|>, {FRAME}; got "{FORGED}"; '
            "remove it or write it differently",
            id="a control token in a column of text",
        ),
    ],
)
def test_a_row_that_is_no_pair(tmp_path: Path, row_format: str, row: dict[str, Any], line: str) -> None:
    sound = {
        "preference": SHORT,
        "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "sharegpt_dpo": SHAREGPT,
        "orca_dpo": {"question": "a", "chosen": "b", "rejected": "c"},
    }[row_format]
    assert refusal(tmp_path, [sound, None, row], row_format) == [f"rows.jsonl:3: {line}"]


@pytest.mark.parametrize(("row_format", "field"), [("preference", "rejected"), ("sharegpt_dpo", "rejected.value")])
def test_answers_that_the_template_makes_the_same(tmp_path: Path, row_format: str, field: str) -> None:
    row: dict[str, Any] = {**SHORT, "rejected": " done\n"}
    if row_format == "sharegpt_dpo":
        row = {**SHAREGPT, "rejected": {"from": "gpt", "value": "b "}}
    what = "the same answer as the chosen one: once both are rendered they have the same tokens"
    assert refusal(tmp_path, [row], row_format, tokenizer=stripping()) == [
        f"rows.jsonl:1: {field.partition('.')[0]}: {what}; {REMOVE}"
    ]
    assert len(prepared(tmp_path, [row], row_format).table) == 1  # under a template that keeps the white space


def test_a_template_that_would_render_two_prompts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ range(99999) | random }}" + CHATML
    assert refusal(tmp_path, [SHORT], tokenizer=tokenizer)[0] == (
        "data.chat_template: the tokenizer's own chat template draws at random, so training and inference would "
        "differ; got random (line 1); name another one in data.chat_template"
    )


def test_what_is_wrong_with_a_conversation_as_a_whole_names_the_row(tmp_path: Path) -> None:
    """Its messages stand in several columns, and either may be at fault."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if 'mine' in messages[-1].content %}{{ raise_exception('not this one') }}{% endif %}" + CHATML
    )
    assert refusal(tmp_path, [{**SHORT, "chosen": "mine"}], tokenizer=tokenizer) == [
        "rows.jsonl:1: the tokenizer's own chat template refuses the conversation; got not this one; "
        "change the row, or name another one in data.chat_template"
    ]


def test_tools_that_the_template_drops_are_named_by_their_column(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    [line] = refusal(tmp_path, [{**SHORT, "tools": [tool]}])
    assert line.startswith("rows.jsonl:1: tools: the tokenizer's own chat template drops the tools; ")


class TestTooLong:
    """Longer than `max_length`, or nothing left of what is compared."""

    @pytest.mark.parametrize(("longer", "shorter"), [("chosen", "rejected"), ("rejected", "chosen")])
    def test_the_answer_that_is_too_long_with_its_prompt_is_named(
        self, tmp_path: Path, longer: str, shorter: str
    ) -> None:
        row = {"prompt": "set the timer", longer: LONG["chosen"], shorter: "done"}
        longest = prepared(tmp_path, [row]).stats.longest
        assert refusal(tmp_path, [SHORT, row], max_length=longest - 1) == [
            f"rows.jsonl:2: {longer}: longer than data.max_length = {longest - 1} tokens; got {longest} tokens; {RAISE}"
        ]

    def test_it_is_no_bad_row_to_be_dropped(self, tmp_path: Path) -> None:
        longest = prepared(tmp_path, [LONG]).stats.longest
        [line] = refusal(tmp_path, [SHORT, LONG], max_length=longest - 1, on_bad_row="drop", max_bad_share=1.0)
        assert line.startswith("rows.jsonl:2: chosen: longer than")

    @pytest.mark.parametrize("short_by", [0, 3])
    def test_a_prompt_that_leaves_nothing_of_the_answers(self, tmp_path: Path, short_by: int) -> None:
        prompt = len(prepared(tmp_path, [LONG]).table[0].prompt_ids)
        limit = prompt - short_by
        assert refusal(tmp_path, [LONG], max_length=limit, overlong="truncate") == [
            f"rows.jsonl:1: prompt: cut at data.max_length = {limit} tokens neither answer has a supervised token "
            f"left; got a prompt of {prompt} tokens; {OR_DROP}"
        ]

    def test_one_token_of_each_answer_is_enough(self, tmp_path: Path) -> None:
        prompt = len(prepared(tmp_path, [SHORT]).table[0].prompt_ids)
        [pair] = prepared(tmp_path, [SHORT], max_length=prompt + 1, overlong="truncate").table
        assert [labels.tolist() for ids, labels in pair.answers] == [ids.tolist() for ids, labels in pair.answers]
        assert [len(ids) for ids, _ in pair.answers] == [1, 1]

    def test_answers_that_are_the_same_after_the_cut(self, tmp_path: Path) -> None:
        [pair] = prepared(tmp_path, [LONG]).table
        prompt = len(pair.prompt_ids)
        limit = prompt + 4
        lengths = [prompt + len(ids) for ids, _ in pair.answers]
        assert refusal(tmp_path, [SHORT, LONG], max_length=limit, overlong="truncate") == [
            f"rows.jsonl:2: rejected: cut at data.max_length = {limit} tokens both answers are the same; "
            f"got {lengths[0]} tokens and {lengths[1]} tokens; {OR_DROP}"
        ]

    def test_every_pair_was_dropped(self, tmp_path: Path) -> None:
        longest = prepared(tmp_path, [LONG]).stats.longest
        assert refusal(tmp_path, [LONG], max_length=20, overlong="drop") == [
            "rows.jsonl: every row is longer than data.max_length = 20 tokens and was dropped; "
            f"raise data.max_length: the longest row has {longest} tokens"
        ]


class TestDataOfTheOtherMethod:
    """One answer a row where two are compared, and the reverse; also where `auto` recognised it."""

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize(
        ("row_format", "row", "line"),
        [
            ("messages", {"messages": TURNS}, "messages: holds one answer"),
            ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, None),
            ("alpaca", {"instruction": "a", "output": "b"}, "holds one answer"),
            ("text", {"text": "a"}, "text: is plain text, without answers"),
        ],
    )
    def test_single_answers_under_dpo(
        self, tmp_path: Path, row_format: str, row: dict[str, Any], line: str | None, named: bool
    ) -> None:
        do = "name a format of two answers (preference, ...), or write method.kind: sft"
        what = f"{line or 'conversations: holds one answer'}, and method.kind: dpo compares two answers to one prompt"
        assert refusal(tmp_path, [row, row], row_format if named else "auto") == [
            f"rows.jsonl:{number}: {what}; {do}" for number in (1, 2)
        ]

    @pytest.mark.parametrize(
        ("row_format", "row", "line"),
        [
            ("preference", SHORT, "chosen: holds two answers to compare"),
            ("sharegpt_dpo", SHAREGPT, "chosen: holds two answers to compare"),
            ("kto", {"prompt": "a", "completion": "b", "label": True}, "completion: holds an answer that was judged"),
        ],
    )
    def test_pairs_under_sft(self, tmp_path: Path, row_format: str, row: dict[str, Any], line: str) -> None:
        path = write_rows(tmp_path / "rows.jsonl", [row])
        settings = DataSettings(train=DataSource(path=str(path), format="auto"), max_length=256)
        with pytest.raises(DataError) as caught:
            prepare(settings.sources("train"), tiny_tokenizer(), settings, seed=0)
        assert str(caught.value) == (
            f"{path}:1: {line}, and method.kind: sft learns one answer a row; "
            "write method.kind: dpo, or name the file's true data format"
        )


def test_bad_pairs_are_dropped_counted_and_named_where_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [SHORT, {**SHORT, "rejected": "done"}, LONG, LONG]
    result = prepared(tmp_path, rows, on_bad_row="drop", max_bad_share=0.25)
    assert (result.stats.rows, result.stats.bad, len(result.table)) == (4, 1, 3)
    assert result.stats.sets[0].source.bad_rows == [
        f"{tmp_path}/rows.jsonl:2: rejected: is the same answer as chosen; {REMOVE}"
    ]


def test_an_error_of_the_tokenizer_is_named_by_its_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that straddles the border of prompt and answer, say."""
    tokenise = Renderer.tokenise

    def refusing(self: Renderer, renderings: Any) -> Any:
        result: list[Any] = tokenise(self, renderings)
        for place, rendering in enumerate(renderings):
            if isinstance(rendering, Rendering) and "REFUSED" in rendering.text:
                result[place] = RowError(f"messages[{rendering.answers[0].message}].content", "straddles", "mend")
        return result

    monkeypatch.setattr(Renderer, "tokenise", refusing)
    rows = [SHORT, {**SHORT, "rejected": "REFUSED"}, {**SHORT, "chosen": "REFUSED"}, SHORT]
    assert refusal(tmp_path, rows) == [
        "rows.jsonl:2: rejected: straddles; mend",
        "rows.jsonl:3: chosen: straddles; mend",
    ]


class TestJudgedAnswers:
    """`kto`: two rows of one prompt make a pair."""

    GOOD, BAD = ({"prompt": "a", "completion": text, "label": text == "good"} for text in ("good", "bad"))

    def rows(self) -> list[dict[str, Any]]:
        other = {"prompt": "b", "completion": "yes", "label": False}
        return [self.BAD, other, self.GOOD, {**other, "completion": "no", "label": True}]

    def test_pairs_name_both_lines_the_chosen_one_first(self, tmp_path: Path) -> None:
        result = prepared(tmp_path, self.rows(), "kto")
        assert [pair.row for pair in result.table] == [f"{tmp_path}/rows.jsonl:{lines}" for lines in ("3+1", "4+2")]
        [first, _] = result.table
        tokenizer = tiny_tokenizer()
        assert tokenizer.decode(first.chosen_ids) == "good<|im_end|>\n"
        assert tokenizer.decode(first.rejected_ids) == "bad<|im_end|>\n"
        assert (result.stats.rows, result.stats.used, result.stats.sets[0].source.pieces) == (4, 2, 2)

    def test_rows_of_two_files_make_a_pair_too(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "one.jsonl", [self.GOOD])
        write_rows(tmp_path / "two.jsonl", [self.BAD])
        settings = DataSettings(train=DataSource(path=str(tmp_path / "*.jsonl"), format="kto"), max_length=99)
        [pair] = prepare_pairs(settings.sources("train"), tiny_tokenizer(), settings, 0, False).table
        assert pair.row == f"{tmp_path}/one.jsonl:1+{tmp_path}/two.jsonl:1"

    def test_a_row_without_a_partner_is_a_bad_one_in_its_place(self, tmp_path: Path) -> None:
        alone = {"prompt": "c", "completion": "x", "label": True}
        what = "its prompt has no undesirable answer, so it makes no pair"
        do = "train on it with a method for judged answers, or remove the row"
        lines = refusal(tmp_path, [self.BAD, alone, "{", self.GOOD], "kto")
        assert lines[0] == f"rows.jsonl:2: label: {what}; {do}"
        assert [line.partition(": ")[0] for line in lines] == ["rows.jsonl:2", "rows.jsonl:3"]
        result = prepared(tmp_path, [self.BAD, alone, self.GOOD], "kto", on_bad_row="drop", max_bad_share=0.5)
        assert (result.stats.rows, result.stats.bad, result.stats.used) == (3, 1, 1)

    @pytest.mark.parametrize(
        ("bad", "place"),
        [
            ({"completion": FORGED}, "1: completion"),
            ({"prompt": FORGED}, "2: prompt"),
        ],
    )
    def test_what_is_wrong_in_a_pair_is_named_in_the_row_that_holds_it(
        self, tmp_path: Path, bad: dict[str, str], place: str
    ) -> None:
        rows = [{**self.BAD, **bad}, {**self.GOOD, **({"prompt": FORGED} if "prompt" in bad else {})}]
        [line] = refusal(tmp_path, rows, "kto")
        assert line.startswith(f"rows.jsonl:{place}: contains the control token <|im_end|>, {FRAME}")

    def test_with_a_bad_row_its_partner_is_left_out_and_says_why(self, tmp_path: Path) -> None:
        rows = [*self.rows(), {"prompt": "c", "completion": FORGED, "label": True}]
        rows.append({"prompt": "c", "completion": "fine", "label": False})
        result = prepared(tmp_path, rows, "kto", on_bad_row="drop", max_bad_share=0.5)
        assert (result.stats.rows, result.stats.bad, result.stats.used) == (6, 2, 2)
        first, second = result.stats.sets[0].source.bad_rows
        assert first.startswith(f"{tmp_path}/rows.jsonl:5: completion: contains the control token")
        assert second == (
            f"{tmp_path}/rows.jsonl:6: makes a pair with {tmp_path}/rows.jsonl:5, which cannot be used; fix that row"
        )

    def test_two_rows_count_where_their_pair_is_dropped_cut_or_came_before(self, tmp_path: Path) -> None:
        long = [{**self.GOOD, "completion": LONG["chosen"]}, {**self.BAD, "completion": "bad"}]
        longest = prepared(tmp_path, long, "kto").stats.longest
        others: dict[str, Any] = {"max_length": longest - 1}
        assert prepared(tmp_path, [*self.rows()[1::2], *long], "kto", overlong="drop", **others).stats.dropped == 2
        assert prepared(tmp_path, long, "kto", overlong="truncate", **others).stats.truncated == 2
        assert prepared(tmp_path, [self.GOOD, self.BAD] * 2, "kto").stats.duplicates == 2

    def test_an_id_that_came_before_is_named_in_its_row(self, tmp_path: Path) -> None:
        rows = [{**row, "id": number % 3} for number, row in enumerate(self.rows())]
        [line] = refusal(tmp_path, rows, "kto")
        assert line.startswith("rows.jsonl:4: id: the same id as in rows.jsonl:1; got 0; ")


def test_all_bad_rows_are_said_at_once(tmp_path: Path) -> None:
    rows = [SHORT, "{", {**SHORT, "rejected": "done"}, {**SHORT, "chosen": FORGED}, json.dumps({"prompt": "a"})]
    assert [line.split(": ")[0] for line in refusal(tmp_path, rows)] == [f"rows.jsonl:{n}" for n in (2, 3, 4, 5)]
