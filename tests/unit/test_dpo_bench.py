"""The benchmark of shared prompts measures equal work, and says what it gained."""

import pytest

from benchmarks import prompt_sharing
from benchmarks.harness import Timings
from benchmarks.prompt_sharing import SharingCase


def test_every_layout_is_timed_on_the_same_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    bars, raw = prompt_sharing.measure_sharing(1, (SharingCase(12, 4), SharingCase(6, 3, packed=True)))
    assert [bar.at for bar in bars] == ["p12 c4, 2 pairs"] * 2 + ["p6 c3, 2 pairs packed"] * 2
    assert raw[0]["gain_in_tokens"] == (2 * 12 + 8) / (12 + 8 + 1)
    assert raw[0]["seconds"].keys() == {"padded", "flat", "shared"}
    assert "1.524 times fewer tokens" in capsys.readouterr().out


def test_the_bar_is_the_gain_in_time_over_the_gain_in_tokens() -> None:
    timings = Timings({"padded": [3.0], "flat": [2.0], "shared": [2.0]})
    padded, flat = prompt_sharing.sharing_bars(SharingCase(99, 50), timings)
    assert padded.measured == pytest.approx(1.5 / (298 / 200))
    assert padded.holds()
    assert flat.measured == pytest.approx(1 / (298 / 200))
    assert not flat.holds()
