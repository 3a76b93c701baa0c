"""Pairs for preference tuning: a request that no command is for gets one fixed answer, all others keep theirs.

    chosen     {"command":"none"}                                   for "Close the garage door"
    rejected   {"command":"set_temperature","room":"garage","degrees":-5}   what the model had invented

Half as many pairs hold on to what the model can do: a row of train.jsonl with its own answer as the chosen one, against
`none` or against the same answer with a key too much, which is how this model errs when it errs.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.quickstart.wordings import INTENTS, SLOTS, Intent

NONE = '{"command":"none"}'
ANCHORS_PER_DOMAIN = 16
Row = dict[str, Any]
# Requests by topic. `invented` is the answer of the model that the quickstart trains, generated greedily once. Requests
# without it are held out; so is a topic that has only such ones.
OUTSIDE: list[Row] = [
    json.loads(line) for line in Path(__file__).with_name("outside.jsonl").read_text(encoding="utf-8").splitlines()
]


def pair_rows(train: Sequence[Row], rng: random.Random) -> list[Row]:
    """Rows in the `preference` format, mixed. `train`: the rows of train.jsonl."""
    rows = [pair(row["request"], NONE, row["invented"]) for row in OUTSIDE if "invented" in row]
    rows += anchors(train, rng)
    rng.shuffle(rows)
    return rows


def anchors(train: Sequence[Row], rng: random.Random) -> list[Row]:
    """Equally many a domain, one in four against a key too much, the others against `none`."""
    rows = []
    for domain in dict.fromkeys(intent.domain for intent in INTENTS):
        intents = {intent.command: intent for intent in INTENTS if intent.domain == domain}
        turns = ([message["content"] for message in row["messages"]] for row in train)
        own = [(request, answer) for request, answer in turns if json.loads(answer)["command"] in intents]
        for index, (request, answer) in enumerate(rng.sample(own, ANCHORS_PER_DOMAIN)):
            wrong = NONE if index % 4 else with_a_key_too_much(answer, intents[json.loads(answer)["command"]], rng)
            rows.append(pair(request, answer, wrong))
    return rows


def with_a_key_too_much(answer: str, intent: Intent, rng: random.Random) -> str:
    """The answer with a slot of another command behind its own."""
    extra = rng.choice([slot for slot in SLOTS if slot not in intent.slots])
    return json.dumps(json.loads(answer) | {extra: rng.choice(SLOTS[extra].trained)}, separators=(",", ":"))


def pair(request: str, chosen: str, rejected: str) -> Row:
    """One row of the `preference` format."""
    return {"prompt": request, "chosen": chosen, "rejected": rejected}


def held_out_rows() -> list[Row]:
    """Held-out requests in the `messages` format; `split` says whether the whole topic is new or only the request."""
    topics = {row["topic"] for row in OUTSIDE if "invented" in row}
    rows = []
    for row in OUTSIDE:
        if "invented" not in row:
            messages = [{"role": "user", "content": row["request"]}, {"role": "assistant", "content": NONE}]
            rows.append({"messages": messages, "split": "request" if row["topic"] in topics else "topic"})
    return rows
