"""Judged answers (KTO) -> pairs, only where one prompt really has a good and a bad answer."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.data.row_errors import RowError
from finetune.data.types import Judged, Message, Preference

_DO = "train on it with a method for judged answers, or remove the row"


@dataclass
class Pairing:
    """`pairs`: (preference, index of its desirable row, of its undesirable one); `errors`: (index, why it has no pair).

    Indices are those of the judged answers; each is in exactly one of the two.
    """

    pairs: list[tuple[Preference, int, int]] = field(default_factory=list)
    errors: list[tuple[int, RowError]] = field(default_factory=list)


def pairs(judged: Sequence[Judged]) -> Pairing:
    """Pair desirable with undesirable answers to the same prompt, in order, each once.

    A pair made of answers to different prompts would teach which prompt is better, so nothing else is paired: an
    answer that finds no partner is an error, and so is one that was judged both ways.
    """
    by_prompt: defaultdict[str, list[int]] = defaultdict(list)
    for index, one in enumerate(judged):
        by_prompt[_key(one.prompt)].append(index)
    result = Pairing()
    for indices in by_prompt.values():
        _pair_prompt(judged, indices, result)
    result.pairs.sort(key=lambda pair: min(pair[1:]))
    result.errors.sort(key=lambda error: error[0])
    return result


def _pair_prompt(judged: Sequence[Judged], indices: Sequence[int], result: Pairing) -> None:
    sides: tuple[dict[str, list[int]], dict[str, list[int]]] = (defaultdict(list), defaultdict(list))
    for index in indices:
        sides[not judged[index].desirable][_key(judged[index].completion)].append(index)
    both = sides[0].keys() & sides[1].keys()
    good, bad = ([index for key, rows in side.items() if key not in both for index in rows] for side in sides)
    good.sort()
    bad.sort()
    for index in indices:
        if _key(judged[index].completion) in both:
            what = "the same answer to the same prompt is judged desirable and undesirable"
            result.errors.append((index, RowError("completion", what, "remove one of them")))
    for one, other in zip(good, bad, strict=False):
        preference = Preference(judged[one].prompt, judged[one].completion, judged[other].completion)
        result.pairs.append((preference, one, other))
    paired = min(len(good), len(bad))
    for index in good[paired:] + bad[paired:]:
        missing = "undesirable" if judged[index].desirable else "desirable"
        what = f"its prompt has no {'further ' if paired else ''}{missing} answer, so it makes no pair"
        result.errors.append((index, RowError("label", what, _DO)))


def _key(messages: Sequence[Message]) -> str:
    return json.dumps(messages, sort_keys=True)
