"""The benchmark measures what it says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import arms, experts, harness, memory
from benchmarks.harness import TIME_BAR_ASSERTED, Bar
from benchmarks.shapes import CPU_SHAPES, draw_routing

FEW_ROWS = CPU_SHAPES[1]


def test_transient_bytes_are_counted_to_the_byte() -> None:
    """Two tensors of 4,000 bytes and their sum live at once; what is released before the peak does not count."""
    assert memory.transient_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 12_000
    assert memory.transient_bytes(lambda: [torch.ones(1000).sum() for _ in range(5)]) < 5_000


def test_arms_take_turns_and_a_ratio_is_a_median_over_rounds() -> None:
    order: list[str] = []
    ticks = iter(range(10_000))
    harness.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, clock=lambda: float(next(ticks))
    )
    assert "".join(order) == "ab" + "ab" + "ab" + "ba" + "ab"  # first steps, one to set the count, three rounds
    timings = harness.Timings({"slow": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 1.0]})
    assert timings.ratio("slow", "fast") == 3.0
    assert timings.median("slow") == 4.0


@pytest.mark.parametrize(("sign", "limit", "inside", "outside"), [("<=", 1.15, 1.43, 1.44), (">=", 1.7, 1.37, 1.35)])
def test_a_test_holds_time_bars_at_four_fifths_and_memory_bars_whole(
    sign: str, limit: float, inside: float, outside: float
) -> None:
    def bar(measured: float, kind: str) -> Bar:
        return Bar("x", "here", measured, sign, limit, kind)  # type: ignore[arg-type]

    assert bar(inside, "time").holds(TIME_BAR_ASSERTED)
    assert not bar(inside, "time").holds()
    assert not bar(outside, "time").holds(TIME_BAR_ASSERTED)
    assert not bar(inside, "memory").holds(TIME_BAR_ASSERTED)
    assert " NO" in harness.table([bar(inside, "time")])


def test_routing_is_uneven_and_the_same_each_time() -> None:
    routing = draw_routing(FEW_ROWS)
    assert 1.5 < routing.skew < 2
    assert torch.equal(routing.index_TK, draw_routing(FEW_ROWS).index_TK)
    assert (routing.index_TK[:, 0] != routing.index_TK[:, 1]).all()
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(FEW_ROWS.tokens))


def test_arms_on_equal_weights_compute_the_same() -> None:
    """Otherwise the race is not fair; the benchmark itself refuses to go on."""
    group = experts.build_arms(experts.QUICK_SHAPES[0], (arms.OURS, arms.DENSE, arms.PEFT_GROUPED))
    assert arms.disagreement(group[arms.DENSE], group[arms.PEFT_GROUPED]) < 1e-5
    assert arms.disagreement(group[arms.OURS], group[arms.PEFT_GROUPED]) > 1e-2  # 4-bit weights are other weights


def test_the_command_runs_and_says_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "experts.json"
    monkeypatch.setattr("sys.argv", ["experts", "--quick", "--repeats", "1", "--output", str(output)])
    experts.main()
    assert "resident bytes / bf16 bytes" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["shapes"][0]["arms"].keys() == set(arms.ARMS)
    assert result["provenance"]["packages"]["peft"]
    assert result["provenance"]["hardware"]["cpu"]
    assert result["provenance"].keys() >= {"git", "started", "finished", "seed"}
