"""Text answers that begin with their whole prompt are refused in every format that has a prompt and text answers."""

from typing import Any

import pytest

from tests.row_formats import ALL_EXAMPLES, assistant, convert, refusal, system, user

ASKED, YES, NO = "Is 91 prime?", "Is 91 prime? Yes.", "Is 91 prime?\nNo."
PAIR = {"chosen": NO, "rejected": YES}
BRIEF = "Answer in one word."


@pytest.mark.parametrize(
    ("row_format", "row", "place", "named"),
    [
        ("alpaca", {"instruction": ASKED, "output": NO}, "output", "instruction"),
        ("alpaca", {"instruction": ASKED, "input": "Divide.", "output": NO}, "output", "instruction"),
        (
            "alpaca",
            {"instruction": "Shorten:", "input": "A big boat.", "output": "Shorten:\n\nA big boat.\n\nA boat."},
            "output",
            "instruction and input",
        ),
        ("dolly", {"instruction": ASKED, "response": NO}, "response", "instruction"),
        ("prompt_completion", {"prompt": ASKED, "completion": NO}, "completion", "prompt"),
        (
            "prompt_completion",
            {"prompt": [system("Be kind."), user(ASKED)], "completion": NO},
            "completion",
            "prompt[1].content",
        ),
        ("preference", {"prompt": ASKED, **PAIR}, "chosen", "prompt"),
        ("preference", {"prompt": [user(ASKED)], **PAIR}, "chosen", "prompt[0].content"),
        ("alpaca_dpo", {"instruction": ASKED, **PAIR}, "chosen", "instruction"),
        ("alpaca_dpo", {"instruction": ASKED, "input": "Divide.", **PAIR}, "chosen", "instruction"),
        ("orca_dpo", {"question": ASKED, **PAIR}, "chosen", "question"),
        (
            "orca_dpo",
            {"system": BRIEF, "question": ASKED, "chosen": f"{BRIEF} {NO}", "rejected": f"{BRIEF} {YES}"},
            "chosen",
            "system",
        ),
        ("kto", {"prompt": ASKED, "completion": NO, "label": True}, "completion", "prompt"),
        ("kto", {"prompt": ASKED, "completion": YES, "label": False}, "completion", "prompt"),
    ],
)
def test_an_answer_that_begins_with_its_prompt_is_refused(
    row_format: str, row: dict[str, Any], place: str, named: str
) -> None:
    assert refusal(row_format, row).startswith(f"{place}: begins with the text of {named}, which would be read twice; ")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (f" {ASKED}\n", f"{ASKED} No."),
        ("Question: Is 91 prime?\nAnswer:", "Question: Is 91 prime?\nAnswer: No."),
        ("Name a fruit", "Name a fruit: apple"),
        ("请解释什么是机器学习。", "请解释什么是机器学习。机器学习是一个领域。"),
    ],
)
def test_the_end_of_the_prompt_needs_no_white_space(prompt: str, answer: str) -> None:
    assert "read twice" in refusal("prompt_completion", {"prompt": prompt, "completion": answer})


@pytest.mark.parametrize(
    ("row_format", "row"),
    [
        ("prompt_completion", {"prompt": "A", "completion": "A good day."}),
        ("prompt_completion", {"prompt": "Good morning!", "completion": "Good morning! What shall we do?"}),
        ("prompt_completion", {"prompt": "Name one car", "completion": "Name one carpet and go."}),
        ("prompt_completion", {"prompt": "It is already right.", "completion": "It is already right."}),
        ("preference", {"prompt": ASKED, "chosen": NO, "rejected": "Yes."}),
        ("preference", {"prompt": ASKED, "chosen": "No.", "rejected": YES}),
    ],
)
def test_greetings_single_repetitions_and_unchanged_texts_are_read(row_format: str, row: dict[str, Any]) -> None:
    convert(row_format, row)


def test_the_advice_reads_an_answer_that_is_to_repeat_its_prompt() -> None:
    row = {"prompt": ASKED, "completion": NO}
    assert refusal("prompt_completion", row) == (
        "completion: begins with the text of prompt, which would be read twice; "
        'got "Is 91 prime?\\nNo."; remove it from completion; '
        "an answer that is to repeat it is written as messages (format prompt_completion)"
    )
    lists = {field: [assistant(answer)] for field, answer in PAIR.items()}
    convert("prompt_completion", {**row, "completion": [assistant(NO)]})
    convert("kto", {**row, "completion": [assistant(NO)], "label": True})
    convert("preference", {"prompt": ASKED, **lists})
    convert("alpaca_dpo", {"instruction": ASKED, **lists})
    convert("messages", {"messages": [user(ASKED), assistant(NO)]})
    assert "; remove it from chosen and rejected; " in refusal("orca_dpo", {"question": ASKED, **PAIR})
    assert "messages (format messages)" in refusal("alpaca", {"instruction": ASKED, "output": NO})


@pytest.mark.parametrize(("row_format", "row"), ALL_EXAMPLES)
def test_every_format_with_a_prompt_and_text_answers_is_held_to_it(row_format: str, row: dict[str, Any]) -> None:
    asked = next((row[name] for name in ("prompt", "question", "instruction") if isinstance(row.get(name), str)), "")
    answers = {name: row[name] for name in ("completion", "chosen", "rejected", "output", "response") if name in row}
    if len(asked.split()) < 3 or not all(isinstance(answer, str) for answer in answers.values()):
        return
    repeated: dict[str, Any] = {name: f"{asked} {answer}" for name, answer in answers.items()}
    assert "read twice" in refusal(row_format, {**row, **repeated})
