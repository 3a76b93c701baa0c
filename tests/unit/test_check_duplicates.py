"""Which training rows stand in the evaluation set: copies, and rows that are nearly so; not rows of the same kind."""

import json
from pathlib import Path

import pytest

from finetune.check.duplicates import LISTED, Pair, find_duplicates, words_of
from finetune.data.formats import reader
from finetune.data.types import Conversation, Document, Judged, Message, Preference

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT.parent / "shared" / "datasets"
STORY = (
    "Janet sells eggs at the market every day. Her hens lay sixteen of them, she eats three for breakfast and bakes "
    "muffins for her friends with four more. How much does she make if each egg that is left over costs two dollars?"
)


def named(file: str, *texts: str) -> list[tuple[str, str]]:
    return [(f"{file}:{line}", text) for line, text in enumerate(texts, start=1)]


def test_the_same_text_is_found_whatever_its_case_and_white_space() -> None:
    duplicates = find_duplicates(
        named("train", "Other words here", STORY.upper()), named("eval", "\n" + STORY.replace(" ", "  "))
    )
    assert (duplicates.eval_rows, duplicates.exact, duplicates.near, duplicates.train_rows) == (1, 1, 0, 1)
    assert [str(pair) for pair in duplicates.pairs] == ["train:2 ~ eval:1 (exact)"]


def test_a_text_with_one_word_changed_is_near() -> None:
    words = len(STORY.split())
    duplicates = find_duplicates(
        named("train", STORY.replace("muffins", "cakes")), named("eval", STORY, "Another question.")
    )
    assert (duplicates.exact, duplicates.near) == (0, 1)
    expected = (words - 2 - 3) / (words - 2 + 3)  # three triples hold the word, in each of the two
    assert duplicates.pairs == [Pair("train:1", "eval:1", expected, exact=False)]
    assert str(duplicates.pairs[0]) == f"train:1 ~ eval:1 ({expected:.2f})"


def test_punctuation_makes_a_text_another_but_keeps_it_near() -> None:
    assert str(find_duplicates(named("train", STORY.replace(",", "")), named("eval", STORY)).pairs[0]).endswith(
        "(1.00)"
    )


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("Set the laundry room to 23 degrees", "Set the laundry room to 25 degrees"),
        ('Lights on {"command":"lights_on"}', 'Lights off {"command":"lights_off"}'),
        ("What is 2 + 2? 4", "What is 2 + 3? 5"),
        ("yes", "no"),
        ("🙂", "🙃"),
        ("", "."),
        (STORY, STORY + " " + STORY.replace("e", "a")),
    ],
)
def test_rows_of_the_same_kind_are_not_near(train: str, evaluation: str) -> None:
    assert find_duplicates(named("train", train), named("eval", evaluation)).pairs == []


def test_short_rows_and_rows_without_words_can_be_the_same() -> None:
    assert find_duplicates(named("train", "Yes", "🙂"), named("eval", "yes", "🙂")).exact == 2


def test_characters_count_as_words_where_there_is_no_space_between_words() -> None:
    text = "珍妮特的鸭子每天下十六个蛋。她每天早上吃三个。还用四个给朋友们烤松饼。剩下的她每天在农贸市场上卖掉。"
    assert find_duplicates(named("train", text.replace("四", "五")), named("eval", text)).near == 1


def test_an_instruction_before_every_question_makes_no_duplicates() -> None:
    subjects = [
        f"{colour} {thing}" for colour in ("red", "old", "new", "wet") for thing in ("car", "hat", "dog", "cup")
    ]
    rows = [f"{STORY} Now tell me, in one word, about the {subject}" for subject in subjects]
    assert (
        find_duplicates(named("train", *rows[1:]), named("eval", *rows[:1])).near == 1
    )  # one row tells nothing of others
    duplicates = find_duplicates(
        named("train", *rows[8:]), named("eval", *rows[:8], *(f"Row {i} of {STORY}" for i in range(4)))
    )
    assert (duplicates.exact, duplicates.near) == (0, 0)


def test_each_evaluation_row_is_counted_once_with_its_nearest_and_only_the_first_are_listed() -> None:
    rows = [" ".join(f"word{n}of{row}" for n in range(30)) for row in range(LISTED + 5)]
    changed = [row + " changed" for row in rows]
    duplicates = find_duplicates(named("train", *changed, *rows[:3], *rows[:3]), named("eval", *rows))
    assert (duplicates.exact, duplicates.exact + duplicates.near, len(duplicates.pairs)) == (3, LISTED + 5, LISTED)
    assert [pair.exact for pair in duplicates.pairs] == [True] * 3 + [False] * (LISTED - 3)
    assert duplicates.pairs[0] == Pair(f"train:{LISTED + 6}", "eval:1", 1.0, exact=True)
    assert duplicates.train_rows == LISTED + 11


def test_the_text_of_a_row_is_its_turns_without_the_system_prompt() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "Köln"}}}
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Wie ist das Wetter?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "17 Grad"},
            {"role": "assistant", "content": "Mild."},
        ]
    }
    example = reader("messages")(row)
    assert isinstance(example, Conversation)
    texts = ["Wie ist das Wetter?", "", '{"name": "look", "arguments": {"at": "Köln"}}', "17 Grad", "Mild."]
    assert words_of(example).split("\n") == texts
    assert words_of(Document("A text.")) == "A text."
    messages = [Message(role="system", content="s"), Message(role="user", content="a")]
    one, other = (Message(role="assistant", content=text) for text in ("b", "c"))
    assert words_of(Preference(messages, [one], [other])) == "a\nb\nc"
    assert words_of(Judged(messages, [one], True)) == "a\nb"


def conversations(path: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return named(path.stem, *("\n".join(each["content"] for each in row["messages"]) for row in rows))


def test_the_commands_of_the_quickstart_are_no_duplicates() -> None:
    folder = ROOT / "data" / "quickstart"
    assert find_duplicates(conversations(folder / "train.jsonl"), conversations(folder / "eval.jsonl")).pairs == []


@pytest.mark.skipif(not DATASETS.is_dir(), reason="the real sets are not here")
def test_real_sets() -> None:
    def gsm8k(split: str) -> list[tuple[str, str]]:
        lines = (DATASETS / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return named(split, *("\n".join(json.loads(line).values()) for line in lines[:1500]))

    assert find_duplicates(gsm8k("train"), gsm8k("test")).pairs == []
    alpaca = json.loads((DATASETS / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    rows = named("alpaca", *("\n".join(row.values()) for row in alpaca))
    duplicates = find_duplicates(rows[200:], rows[:200])  # the demonstration holds some rows twice
    assert (duplicates.exact, duplicates.near) == (5, 0)
