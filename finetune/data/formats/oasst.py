"""OpenAssistant's trees: one row is a prompt with all replies to it, and to those, and so on."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from finetune.data.formats.drafts import Talk
from finetune.data.formats.fields import Fields, checked_text
from finetune.data.formats.turns import Spelling, Turn, read_role
from finetune.data.rows import RowError, shown
from finetune.data.types import Message, Role

NODE = Spelling("role", "text")
ROLES: dict[str, Role] = {"prompter": "user", "assistant": "assistant"}
SPAM = 0.5


class UnusableRowError(RowError):
    """The row is surely of this format, in a form that cannot be used: so it is of no other format either."""


def oasst(row: Fields) -> Talk:
    """`prompt`: the root of a tree (text, role, replies); the best-ranked path, up to its last answer.

    Left out are messages deleted, rejected in review (`review_result: false`) or labelled spam. Rank 0 is the best;
    replies without a rank come after those that have one, in the file's order.
    """
    if row.name("prompt") not in row.row and {"message_id", "parent_id", "text"} <= row.row.keys():
        do = (
            "use the export of trees (one tree a line, file names with `trees`): a row must hold the whole conversation"
        )
        raise UnusableRowError(
            "parent_id", "the row is one message of an OpenAssistant tree", do, shown(row.row["parent_id"])
        )
    node, place, turns = _node(row.required("prompt"), row.name("prompt")), row.name("prompt"), []
    if _left_out(node):
        raise RowError(place, "the tree's prompt was deleted or is spam", "remove the row")
    while True:
        turns.append(_turn(node, place))
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RowError(
                f"{place}.replies", "must be a list of messages", "write [{text, role}, ...]", shown(replies)
            )
        candidates = [
            (_node(reply, f"{place}.replies[{i}]"), f"{place}.replies[{i}]") for i, reply in enumerate(replies)
        ]
        candidates = [(reply, where) for reply, where in candidates if not _left_out(reply)]
        if not candidates:
            return Talk(_until_last_answer(turns))
        node, place = min(candidates, key=lambda candidate: _rank(*candidate))


def _until_last_answer(turns: list[Turn]) -> list[Turn]:
    """Annotators stop anywhere: a last question that nobody answered holds nothing to learn."""
    if len(turns) > 1 and turns[-1].message["role"] != "assistant":
        return turns[:-1]
    return turns


def _node(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(place, "must be a message with its replies", "write {text, role, replies}", shown(value))
    for key in (NODE.role, NODE.content):
        if value.get(key) is None:
            raise RowError(f"{place}.{key}", "is missing", "a message has text and role", f"keys {sorted(value)}")
    return value


def _turn(node: Mapping[str, Any], place: str) -> Turn:
    role = read_role(node, place, NODE, ROLES)
    return Turn(Message(role=role, content=checked_text(node["text"], f"{place}.text")), place, NODE)


def _left_out(node: Mapping[str, Any]) -> bool:
    labels = node.get("labels")
    spam = labels.get("spam") if isinstance(labels, dict) else None
    value = spam.get("value") if isinstance(spam, dict) else None
    labelled_spam = isinstance(value, int | float) and value > SPAM
    return node.get("deleted") is True or node.get("review_result") is False or labelled_spam


def _rank(node: Mapping[str, Any], place: str) -> float:
    rank = node.get("rank")
    if rank is None:
        return float("inf")
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not isfinite(rank):
        raise RowError(f"{place}.rank", "must be a number", "write 0 for the best reply, or null", shown(rank))
    return rank
