"""Write the files of the quickstart: plain-English requests answered by one-line JSON commands.

    python data/quickstart/generate.py

train.jsonl and eval.jsonl teach and count the commands; dpo-train.jsonl holds pairs that teach which requests none of
them is for (`pairs.py`), dpo-eval.jsonl such requests that no pair contains.

Standard library only, seeded: the committed files are this program's output, byte for byte (a test compares them).
Every row of eval.jsonl says in `split` what is new in it: "values" is a trained wording with at least one value that no
training row contains, "wording" is a wording that no training row uses.
"""

import itertools
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository, so that the plain command works from anywhere
from data.quickstart.pairs import Row, held_out_rows, pair_rows  # noqa: E402
from data.quickstart.wordings import INTENTS, SLOTS, Intent, Value  # noqa: E402

SEED = 20
TRAIN_ROWS_PER_DOMAIN = 120
EVAL_ROWS_PER_DOMAIN_AND_SPLIT = 7
DOMAINS = tuple(dict.fromkeys(intent.domain for intent in INTENTS))


def row(intent: Intent, wording: str, values: dict[str, Value], **extra: str) -> Row:
    """One row in the `messages` format; the answer is compact JSON on one line."""
    answer = json.dumps(intent.answer(values), separators=(",", ":"))
    messages = [{"role": "user", "content": wording.format(**values)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def wordings(domain: str, rng: random.Random, *, held_out: bool) -> Iterator[tuple[Intent, str]]:
    """The domain's wordings in random order, again and again, so that each is used equally often."""
    pairs = [
        (intent, wording)
        for intent in INTENTS
        if intent.domain == domain
        for wording in (intent.held_out if held_out else intent.trained)
    ]
    rng.shuffle(pairs)
    return itertools.cycle(pairs)


def train_rows(rng: random.Random) -> list[Row]:
    """Distinct rows of trained wordings and trained values only, the domains mixed."""
    rows = []
    for domain in DOMAINS:
        seen: set[str] = set()
        for intent, wording in wordings(domain, rng, held_out=False):
            if len(seen) == TRAIN_ROWS_PER_DOMAIN:
                break
            values = {slot: rng.choice(SLOTS[slot].trained) for slot in intent.slots}
            request = wording.format(**values)
            if request not in seen:
                seen.add(request)
                rows.append(row(intent, wording, values))
    rng.shuffle(rows)
    return rows


def eval_rows(rng: random.Random, split: str) -> list[Row]:
    """Distinct rows of one split, equally many a domain."""
    rows = []
    for domain in DOMAINS:
        seen: set[str] = set()
        for intent, wording in wordings(domain, rng, held_out=split == "wording"):
            if len(seen) == EVAL_ROWS_PER_DOMAIN_AND_SPLIT:
                break
            values = {slot: rng.choice(SLOTS[slot].trained + SLOTS[slot].held_out) for slot in intent.slots}
            if split == "values":
                new = rng.choice(intent.slots)
                values[new] = rng.choice(SLOTS[new].held_out)
            request = wording.format(**values)
            if request not in seen:
                seen.add(request)
                rows.append(row(intent, wording, values, split=split))
    return rows


def files() -> dict[str, str]:
    """File name -> whole content, as JSON lines."""
    rng = random.Random(SEED)
    train = train_rows(rng)
    parts = {
        "train.jsonl": train,
        "eval.jsonl": eval_rows(rng, "values") + eval_rows(rng, "wording"),
        "dpo-train.jsonl": pair_rows(train, rng),
        "dpo-eval.jsonl": held_out_rows(),
    }
    return {name: "".join(json.dumps(each) + "\n" for each in rows) for name, rows in parts.items()}


def main() -> None:
    """Write all files beside this program, each replaced as a whole."""
    for name, content in files().items():
        temporary = HERE / f".{name}.tmp"
        temporary.write_text(content, encoding="utf-8", newline="\n")
        os.replace(temporary, HERE / name)
        print(f"{name}: {content.count(chr(10))} rows")


if __name__ == "__main__":
    main()
