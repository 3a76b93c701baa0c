"""Whatever the pairs: each predicting place sees its document up to there, and nothing else."""

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.tokens.collators import PairCollator, PairLayout
from finetune.data.types import TokenPair
from finetune.methods.pairs import shared_prompt_mask
from tests.unit.pairs import LAYOUTS, TOKENIZER, token_pair

Documents = list[tuple[list[int], list[int], int]]


@st.composite
def features(draw: st.DrawFn) -> tuple[list[TokenPair], list[dict[str, Any]]]:
    """Up to five pairs, some of them packed into one feature, in any order."""
    length = st.integers(1, 9)
    lengths = draw(st.lists(st.tuples(length, length, length), min_size=1, max_size=5))
    pairs = [token_pair(*each, number) for number, each in enumerate(lengths)]
    order = draw(st.permutations(range(len(pairs))))
    cuts = [0, *(cut for cut in range(1, len(pairs)) if draw(st.booleans())), len(pairs)]
    return pairs, [{"pairs": order[a:b], "split": "train"} for a, b in pairwise(cuts)]


def documents(pairs: list[TokenPair], cells: list[dict[str, Any]]) -> Documents:
    """(ids, labels of its answer, tokens of the prompt), the chosen ones first, in a plain loop."""
    found = []
    for number in (0, 1):
        for cell in cells:
            for index in cell["pairs"]:
                pair = pairs[index]
                ids, labels = pair.answers[number]
                found.append(([*pair.prompt_ids.tolist(), *ids.tolist()], labels.tolist(), len(pair.prompt_ids)))
    return found


def visible(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Who sees whom, `[rows, T, T]`, by each layout's own means."""
    if "branch" in batch:
        return shared_prompt_mask(batch["document"], batch["branch"], "sdpa", torch.float32)[:, 0]
    T = batch["input_ids"].shape[1]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    if "attention_mask" in batch:
        return causal & batch["attention_mask"].bool()[:, None]
    number = (batch["position_ids"] == 0).cumsum(-1)
    return causal & (number[:, :, None] == number[:, None])


def positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As the model counts them."""
    ids = batch["input_ids"]
    return batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))


@settings(max_examples=60, deadline=None)
@given(features(), st.sampled_from(LAYOUTS), st.sampled_from([1, 8]))
def test_each_predicting_place_sees_its_document_up_to_there(
    drawn: tuple[list[TokenPair], list[dict[str, Any]]], layout: PairLayout, multiple: int
) -> None:
    pairs, cells = drawn
    batch = PairCollator(TOKENIZER, {"train": pairs}, layout, pad_to_multiple_of=multiple)(cells)
    T, sees, place_of = batch["input_ids"].shape[1], visible(batch), positions(batch)
    assert batch["answer_index"].shape == batch["completion_mask"].shape
    for number, (ids, labels, prompt) in enumerate(documents(pairs, cells)):
        assert batch["answer_length"][number] == len(labels)
        for j, index in enumerate(batch["answer_index"][number].tolist()):
            if j >= len(labels):
                assert index == batch["completion_mask"][number, j] == 0
                continue
            row, place = divmod(index, T)
            seen = sees[row, place].nonzero().flatten()
            assert batch["input_ids"][row, seen].tolist() == ids[: prompt + j]
            assert place_of[row, seen].tolist() == list(range(prompt + j))
            assert batch["input_ids"][row, place + 1] == ids[prompt + j]
            assert batch["shift_labels"][row, place] == labels[j]
            assert batch["completion_mask"][number, j] == (labels[j] != -100)
    assert (batch["shift_labels"] != -100).sum() == batch["completion_mask"].sum()
    assert (sees.sum(-1) > 0).all() or layout == "padded"


@settings(max_examples=60, deadline=None)
@given(features(), st.sampled_from(LAYOUTS))
def test_weights_count_the_tokens_of_all_documents(
    drawn: tuple[list[TokenPair], list[dict[str, Any]]], layout: PairLayout
) -> None:
    pairs, cells = drawn
    batch = PairCollator(TOKENIZER, {"train": pairs}, layout)(cells)
    counted: Counter[tuple[int, int]] = Counter()
    for token, position, weight in zip(
        batch["input_ids"].flatten().tolist(),
        positions(batch).flatten().tolist(),
        batch["weight"].flatten().tolist(),
        strict=True,
    ):
        counted[token, position] += weight
    wanted = Counter((token, place) for ids, _, _ in documents(pairs, cells) for place, token in enumerate(ids))
    assert +counted == wanted
    assert batch["rows"] == [pairs[index].row for cell in cells for index in cell["pairs"]]
