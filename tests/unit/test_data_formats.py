"""Formats of conversations: what each row becomes, and every way in which one can be wrong."""

import json
from typing import Any

import pytest

from finetune.data.types import Conversation, Document
from tests.row_formats import assistant, convert, refusal, system, talk, user

USER, ASSISTANT, SYSTEM = user("hi"), assistant("hello"), system("be brief")


def test_messages_are_kept_as_they_are_and_further_keys_of_the_row_are_ignored() -> None:
    row = {"messages": [SYSTEM, USER, ASSISTANT], "split": "values"}
    assert talk("messages", row) == [SYSTEM, USER, ASSISTANT]


def test_white_space_in_contents_is_kept() -> None:
    assert talk("prompt_completion", {"prompt": " a\r\n", "completion": "b \n"}) == [user(" a\r\n"), assistant("b \n")]


def test_a_developer_message_is_a_system_message() -> None:
    developer = {"role": "developer", "content": "be brief"}
    assert talk("messages", {"messages": [developer, USER, ASSISTANT]})[0] == SYSTEM


def test_text_parts_are_joined_and_keys_that_are_null_say_nothing() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i", "image_url": None}]
    asked = {"role": "user", "content": parts, "tool_calls": None, "refusal": None}
    assert talk("messages", {"messages": [asked, ASSISTANT], "tools": None}) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("flag", "learned"),
    [({"train": False}, False), ({"weight": 0}, False), ({"weight": 1}, True), ({"train": True}, True)],
)
def test_train_and_weight_say_the_same(flag: dict[str, Any], learned: bool) -> None:
    row = {"messages": [{**USER, "weight": 0}, {**ASSISTANT, **flag}, USER, ASSISTANT]}
    assert talk("messages", row) == [{**USER, "train": False}, {**ASSISTANT, "train": learned}, USER, ASSISTANT]


def test_prompt_and_completion_become_user_and_assistant() -> None:
    assert talk("prompt_completion", {"prompt": "hi", "completion": "hello"}) == [USER, ASSISTANT]


def test_answers_in_a_prompt_of_messages_are_given_and_not_learned() -> None:
    row = {"prompt": [SYSTEM, USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert talk("prompt_completion", row) == [SYSTEM, USER, {**ASSISTANT, "train": False}, USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row_format", "further", "answer"), [("alpaca", "input", "output"), ("dolly", "context", "response")]
)
def test_an_instruction_and_its_material_are_joined_by_an_empty_line(
    row_format: str, further: str, answer: str
) -> None:
    row = {"instruction": "Add", further: "1 2", answer: "3"}
    assert talk(row_format, row) == [user("Add\n\n1 2"), assistant("3")]
    for nothing in ("", " \n", None):
        assert talk(row_format, {**row, further: nothing}) == [user("Add"), assistant("3")]
    del row[further]
    assert talk(row_format, row) == [user("Add"), assistant("3")]


def test_alpaca_has_a_system_text_and_a_history() -> None:
    row = {"instruction": "c", "output": "d", "system": "be brief", "history": [["a", "b"]]}
    assert talk("alpaca", row) == [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]
    assert talk("alpaca", {**row, "system": "", "history": []}) == [user("c"), assistant("d")]


def test_text_is_a_document() -> None:
    assert convert("text", {"text": " a\r\n"}) == Document(" a\r\n")


@pytest.mark.parametrize("column", ["conversations", "conversation"])
def test_sharegpt_in_both_spellings(column: str) -> None:
    from_value = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": None}]
    assert talk("sharegpt", {column: from_value, "system": "be brief"}) == [SYSTEM, USER, ASSISTANT]
    assert talk("sharegpt", {column: [SYSTEM, USER, ASSISTANT]}) == [SYSTEM, USER, ASSISTANT]


def test_columns_of_csv_and_arrow_are_read_as_what_they_hold() -> None:
    turns = [
        {"from": None, "value": None, "role": message["role"], "content": message["content"]}
        for message in (USER, ASSISTANT)
    ]
    assert talk("sharegpt", {"conversations": None, "conversation": turns}) == [USER, ASSISTANT]
    assert talk("messages", {"messages": json.dumps([USER, ASSISTANT])}) == [USER, ASSISTANT]
    assert refusal("messages", {"messages": "[{"}).startswith("messages: not valid JSON (Expecting property name")


def node(text: str, role: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), **more}


def test_of_a_tree_the_best_ranked_path_is_taken_up_to_its_last_answer() -> None:
    best = node(
        "good", "assistant", node("more?", "prompter", node("yes", "assistant", node("thanks", "prompter"))), rank=0
    )
    tree = node("hi", "prompter", node("unranked", "assistant"), node("bad", "assistant", rank=1), best)
    assert talk("oasst", {"prompt": tree}) == [user("hi"), assistant("good"), user("more?"), assistant("yes")]


@pytest.mark.parametrize(
    "out", [{"deleted": True}, {"review_result": False}, {"labels": {"spam": {"value": 0.9, "count": 3}}}]
)
def test_messages_of_a_tree_that_are_deleted_rejected_or_spam_are_left_out(out: dict[str, Any]) -> None:
    tree = node("hi", "prompter", node("bad", "assistant", rank=0, **out), node("good", "assistant", rank=1))
    assert talk("oasst", {"prompt": tree})[1] == assistant("good")
    message = "prompt: the tree's prompt was deleted or is spam; remove the row"
    assert refusal("oasst", {"prompt": {**tree, **out}}) == message


def test_a_row_that_is_one_message_of_a_tree_is_refused_with_what_to_do() -> None:
    row = {"message_id": "b", "parent_id": "a", "text": "hello"}
    assert refusal("oasst", row) == (
        'parent_id: the row is one message of an OpenAssistant tree; got "a"; use the export of trees (one tree a '
        "line, file names with `trees`): a row must hold the whole conversation"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", 'messages: must be a list of messages; got "hi"; write [{role, content}, ...]'),
        ([], "messages: must be a list of messages; got []; write [{role, content}, ...]"),
        (["hi"], 'messages[0]: must be an object with role and content; got "hi"; write {role, content}'),
        ([{"content": "hi"}], "messages[0].role: is missing; got keys ['content']; a message has role and content"),
        ([{"role": "user"}], "messages[0].content: is missing; got keys ['role']; a message without tool_calls says"),
        ([{"role": "agent", "content": "a"}], 'messages[0].role: unknown role; got "agent"; use one of system, user'),
        ([{"role": ["user"], "content": "a"}], 'messages[0].role: unknown role; got ["user"]; use one of'),
        ([USER, {**ASSISTANT, "content": True}], "messages[1].content: must be text; got true; write a string"),
        ([USER, {**ASSISTANT, "content": None}], "messages[1].content: must be text; got null; write a string"),
        ([USER, {**ASSISTANT, "content": " \n"}], 'messages[1].content: is empty; got " \\n"; remove the row or fill'),
        ([USER, {**ASSISTANT, "content": []}], 'messages[1].content: is empty; got ""; remove the row or fill it in'),
        ([USER, {**ASSISTANT, "content": "\ud83d"}], "messages[1].content: half of a surrogate pair; got "),
        ([{**USER, "content": [{"type": "image_url"}]}], "messages[0].content[0].type: is not a text part; got"),
        ([{**USER, "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text: must be text; got 3"),
        ([{**USER, "content": ["hi"]}], 'messages[0].content[0]: must be an object with type and text; got "hi"'),
        (
            [USER, {**ASSISTANT, "mood": "hm"}],
            'messages[1].mood: is not supported and must not be ignored; got "hm"; remove it: a message has role, '
            "content, reasoning_content, reasoning, thinking, reasoning_details, tool_calls, ",
        ),
        ([USER, {**ASSISTANT, "\ud83d\n": 1}], "messages[1]['\\ud83d\\n']: is not supported and must not be ignored"),
        ([{**USER, "train": 1}], "messages[0].train: must be true or false; got 1; write true or false"),
        ([{**USER, "weight": 0.5}], "messages[0].weight: must be 0 or 1; got 0.5; a message counts or does not"),
        ([{**USER, "weight": True}], "messages[0].weight: must be 0 or 1; got true"),
        ([{**USER, "weight": "1"}], 'messages[0].weight: must be 0 or 1; got "1"'),
        ([USER, {**ASSISTANT, "train": False, "weight": 1}], "messages[1].weight: contradicts train: false; got 1"),
        ([{**USER, "train": True}], "messages[0].train: only the assistant's messages can be chosen to be learned;"),
        ([USER, {**ASSISTANT, "train": False}], "messages[1]: no assistant message is learned (train: false or weight"),
        ([{**USER, "name": "Ann"}], 'messages[0].name: only a tool\'s message has a name; got "Ann"; remove it, or'),
        ([USER, SYSTEM, ASSISTANT], 'messages[1].role: a system message must come first; got ["user", "system", '),
        ([SYSTEM, SYSTEM, USER], "messages[1].role: a system message must come first; got "),
        ([ASSISTANT], 'messages[0].role: the assistant speaks before the user; got ["assistant"]; begin with a user'),
        ([SYSTEM, ASSISTANT], "messages[1].role: the assistant speaks before the user; got "),
        ([USER, USER, ASSISTANT], 'messages[1].role: two user messages in a row; got ["user", "user", '),
        ([USER, ASSISTANT, ASSISTANT], "messages[2].role: two assistant messages in a row; got "),
        ([USER, ASSISTANT, USER], "messages[2].role: the last message is not the assistant's; got "),
        ([SYSTEM, USER], "messages[1].role: the last message is not the assistant's; got "),
    ],
)
def test_wrong_messages_are_named(messages: object, message: str) -> None:
    assert refusal("messages", {"messages": messages}).startswith(message)


@pytest.mark.parametrize(
    ("row_format", "row", "message"),
    [
        ("messages", {"a": 1}, "messages: is missing; got keys ['a']; add it, map it with `columns`, or name the"),
        ("messages", {"messages": None}, "messages: is null; got null; fill it in or remove the row"),
        ("prompt_completion", {"prompt": "a"}, "completion: is missing; got keys ['prompt']"),
        (
            "prompt_completion",
            {"prompt": True, "completion": "a"},
            "prompt: must be text or a list of messages; got true",
        ),
        ("prompt_completion", {"prompt": "a", "completion": ""}, 'completion: is empty; got ""'),
        (
            "prompt_completion",
            {"prompt": [USER, ASSISTANT], "completion": [USER, ASSISTANT]},
            'completion[0].role: a completion must begin with the assistant; got "user"; move what precedes it to',
        ),
        ("alpaca", {"instruction": "a"}, "output: is missing; got keys ['instruction']"),
        ("alpaca", {"instruction": "a", "input": True, "output": "b"}, "input: must be text; got"),
        ("alpaca", {"instruction": "", "output": "b"}, 'instruction: is empty; got ""'),
        ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, 'history: must be a list of pairs; got "c"'),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, 'history[0]: must be a pair; got ["c"]'),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["c", True]]},
            "history[0][1]: must be text; got true",
        ),
        ("dolly", {"instruction": "a", "context": "c"}, "response: is missing"),
        ("text", {"text": True}, "text: must be text; got true"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0].value: is missing; got keys ['from']"),
        ("sharegpt", {"conversation": [{"from": "x", "value": "y"}]}, 'conversation[0].from: unknown role; got "x"'),
        ("sharegpt", {"conversations": [{"value": "y"}]}, "conversations[0].from: is missing; got keys ['value']"),
        ("sharegpt", {"conversations": [{"input": "y"}]}, "conversations[0].input: is not supported and must not be"),
        (
            "sharegpt",
            {"conversations": [SYSTEM, USER, ASSISTANT], "system": "a"},
            "system: the row has a second system message in conversations[0]; keep one of the two",
        ),
        ("oasst", {"prompt": "a"}, 'prompt: must be a message with its replies; got "a"; write {text, role, replies}'),
        ("oasst", {"prompt": {"text": "a"}}, "prompt.role: is missing; got keys ['text']; a message has text and role"),
        ("oasst", {"prompt": node("a", "user")}, 'prompt.role: unknown role; got "user"; use one of'),
        ("oasst", {"prompt": node("a", "prompter")}, "prompt.role: the last message is not the assistant's"),
        ("oasst", {"prompt": node("a", "prompter", replies="b")}, "prompt.replies: must be a list of messages"),
        (
            "oasst",
            {"prompt": node("a", "prompter", node("b", "assistant", rank="x"))},
            'prompt.replies[0].rank: must be a number; got "x"; write 0 for the best reply, or null',
        ),
        (
            "oasst",
            {"prompt": node("a", "prompter", node(" ", "assistant"))},
            'prompt.replies[0].text: is empty; got " "; remove the row or fill it in',
        ),
    ],
)
def test_wrong_fields_are_named(row_format: str, row: dict[str, Any], message: str) -> None:
    assert refusal(row_format, row).startswith(message)


def test_a_row_nested_beyond_what_can_be_walked_is_refused() -> None:
    arguments: dict[str, Any] = {}
    for _ in range(100_000):
        arguments = {"a": arguments}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    assert refusal("messages", row).endswith("is nested too deeply; flatten it")


def test_a_conversation_without_tools_has_none() -> None:
    nothings: tuple[Any, ...] = ([], "[]", "", None)
    for nothing in nothings:
        example = convert("messages", {"messages": [USER, ASSISTANT], "tools": nothing})
        assert isinstance(example, Conversation)
        assert example.tools is None
