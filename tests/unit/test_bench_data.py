"""The benchmark of packing and preparing data measures what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import check_memory, data, packed_batches, packing_waste, preparing
from tests.support import tiny_tokenizer


@pytest.mark.parametrize("mean", packing_waste.MEANS)
def test_lengths_have_the_mean_they_are_named_after_once_they_are_cut(mean: int) -> None:
    lengths = packing_waste.draw_lengths(mean, 1.0, 40_000)
    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    assert (lengths.min() >= 1, lengths.max()) == (True, packing_waste.CAPACITY)
    assert np.log(lengths[lengths < packing_waste.CAPACITY]).std() > 0.7
    assert np.array_equal(lengths, packing_waste.draw_lengths(mean, 1.0, 40_000))


def test_waste_is_the_share_of_places_without_a_token() -> None:
    assert packing_waste.waste(np.array([30, 20, 50]), sequences=2, capacity=100) == 0.5


def test_both_packers_keep_every_row_and_trl_packs_a_thousand_at_a_time() -> None:
    """1,000 rows of 60 % and, in the next batch, 1,000 that would fill them up: only a global packing sees both."""
    lengths = np.array([60] * 1000 + [40] * 1000)
    assert packing_waste.our_sequences(lengths, capacity=100) == 1000
    assert packing_waste.trl_sequences(lengths, capacity=100) == 1000 + 500


def test_generated_rows_have_the_length_they_should_and_are_the_same_each_time(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for name in ("a", "b"):
        preparing.write_rows(tmp_path / name, 300, preparing.characters_a_token(tokenizer))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    texts = preparing.rendered_texts(tmp_path / "a", tokenizer)
    tokens = [len(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    assert np.mean(tokens) == pytest.approx(preparing.MEAN_TOKENS, rel=0.15)


def test_each_preparation_and_each_packing_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))  # put back afterwards
    preparing.write_rows(tmp_path / "rows.jsonl", 5, 2.0)
    arms = preparing.Arms(tmp_path / "rows.jsonl", tiny_tokenizer(), tmp_path / "cache")
    assert arms.prepare().dataset.cache_files != arms.prepare().dataset.cache_files
    arms.pack()
    (packed,) = (tmp_path / "cache/rows").glob("packed-*")
    (rows,) = (tmp_path / "cache/rows").glob("rows-*")
    before = packed.stat().st_ctime_ns, rows.stat().st_ctime_ns
    packed_again = arms.pack()
    assert (packed.stat().st_ctime_ns != before[0], rows.stat().st_ctime_ns == before[1]) == (True, True)
    assert packed_again.stats.sequences < 5


def test_the_benchmark_stops_where_the_arms_do_not_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    preparing.write_rows(tmp_path / "rows.jsonl", 3, 2.0)
    arms = preparing.Arms(tmp_path / "rows.jsonl", tiny_tokenizer(), tmp_path / "cache")
    assert preparing.check_same_work(arms)["rows"] == 3
    arms.texts[1] += "!"
    with pytest.raises(SystemExit, match=r"differ at .*rows\.jsonl:2"):
        preparing.check_same_work(arms)


def test_a_failing_check_stops_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_memory, "_RECIPE", "lora: 1\n")
    with pytest.raises(SystemExit, match=r"finetune check failed on 2 generated rows:\n.*recipe\.yaml"):
        check_memory.check(2)


def test_the_data_benchmark_runs_and_says_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "data.json"
    monkeypatch.setattr("sys.argv", ["data", "--quick", "--repeats", "1", "--output", str(output)])
    data.main()
    assert "waste of ours / of TRL's batches of 1,000" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert {bar["kind"] for bar in result["bars"]} == {"count", "time", "memory"}
    assert result["preparing"][0]["arms"].keys() == {preparing.BARE, preparing.PREPARE, preparing.PACK}
    assert result["check"]["large"]["peak_bytes"] > 2**20
    assert result["provenance"]["hardware"]["cpu"]


def test_packed_rows_under_each_other_grow_with_their_number_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows in one have eight times the mask for each token; time is left to a machine that has nothing else."""
    output = tmp_path / "packed.json"
    arguments = ["--rows", "8", "--tokens", "160", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["packed_batches", *arguments])
    packed_batches.main()
    result = json.loads(output.read_text())
    bars = {bar["ratio"]: bar["measured"] for bar in result["bars"]}
    memory = bars["memory under each other / B x one at a time"]
    assert memory <= packed_batches.MEMORY_LIMIT
    assert memory / bars["memory under each other / in one row"] > packed_batches.MEMORY_LIMIT
