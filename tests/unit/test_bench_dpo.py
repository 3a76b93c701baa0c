"""Where preference tuning stands against its bars, on small shapes: memory whole, time at four fifths of its value.

Times are medians of interleaved repeats, in processor time of one thread, and are taken a second time before a test
fails.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import dpo, loss_head, prompt_sharing
from benchmarks.dpo import FROM_ADAPTER, LIVE_ARM, MODES, SFT_ARM, STORED
from benchmarks.harness import REPEATS, TIME_BAR_ASSERTED, Bar, interleaved
from benchmarks.loss_head import LOGITS, OURS, TRL, HeadShape
from benchmarks.memory import transient_bytes
from benchmarks.pair_training import PRECOMPUTED, SMALL, Workplace, training_arm
from finetune.recipe.settings import Recomputation


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace.make(tmp_path_factory.mktemp("work"), SMALL)


@pytest.fixture(scope="module")
def arms(work: Workplace) -> dpo.Arms:
    return dpo.build_arms(work)


def missed_twice(measure: Callable[[], list[Bar]]) -> list[Bar]:
    """The bars that two measurements in a row miss."""
    missed: list[Bar] = []
    for _ in range(2):
        missed = [bar for bar in measure() if not bar.holds(TIME_BAR_ASSERTED)]
        if not missed:
            break
    return missed


@pytest.mark.parametrize("mode", MODES)
def test_a_step_takes_little_more_time_than_one_of_sft(arms: dpo.Arms, mode: Recomputation) -> None:
    dpo.recompute(arms, mode)
    held = {name: arms[name] for name in (SFT_ARM, *dpo.TIME_BARS[mode]) if not name.endswith(FROM_ADAPTER)}
    assert missed_twice(lambda: dpo.time_bars(held, mode, "here", REPEATS)[0]) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_step_holds_little_more_than_one_of_sft(arms: dpo.Arms, mode: Recomputation) -> None:
    dpo.recompute(arms, mode)
    bars, held = dpo.memory_bars(arms, "here")
    limits = {bar.ratio: bar.limit for bar in bars if bar.limit is not None}
    names = (STORED, LIVE_ARM, STORED + FROM_ADAPTER, LIVE_ARM + FROM_ADAPTER)
    assert limits == {f"{name} / SFT, peak of a step": 1.10 for name in names}
    assert [bar for bar in bars if not bar.holds()] == []
    # The reference of a run that starts from an adapter is a copy of the factors, and nothing else.
    copied = held[STORED + FROM_ADAPTER]["resident"] - held[STORED]["resident"]
    factors = [each for each in arms[STORED].trainer.model.parameters() if each.requires_grad]
    assert copied == sum(each.numel() * each.element_size() for each in factors)


def test_the_loss_head_holds_little_of_what_full_logits_would() -> None:
    shape = HeadShape(512, 16384, 64, (LOGITS, TRL, OURS))
    peaks = {name: transient_bytes(arm) for name, arm in loss_head.head_arms(shape).items()}
    theirs, ours = loss_head.head_bars(shape, peaks)
    assert (theirs.limit, ours.limit) == (None, 0.15)
    assert ours.holds()
    assert theirs.measured > 1  # why it was given other tiles


def test_shared_prompts_gain_time() -> None:
    case = replace(prompt_sharing.CASES[0], pairs=1)
    steps = prompt_sharing.sharing_arms(prompt_sharing.scoring_mixtral(), case)
    assert missed_twice(lambda: prompt_sharing.sharing_bars(case, interleaved(steps, 5))) == []


def test_arms_on_other_tokens_are_refused(arms: dpo.Arms, work: Workplace) -> None:
    other = training_arm(work.recipe(PRECOMPUTED))
    other.features = other.features[:-1]
    with pytest.raises(SystemExit, match="DPO and SFT do not train on the same tokens"):
        dpo.check_same_tokens({SFT_ARM: arms[SFT_ARM], STORED: other})


def test_the_command_runs_and_says_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "dpo.json"
    monkeypatch.setattr("sys.argv", ["dpo", "--quick", "--repeats", "1", "--output", str(output)])
    dpo.main()
    assert "DPO live / SFT, time of a step" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result.keys() >= {"steps", "extras", "heads", "sharing"}
    assert all(bar["limit"] is None for bar in result["bars"])
    assert result["provenance"]["hardware"]["cpu"]
    assert result["provenance"].keys() >= {"git", "started", "finished", "seed"}
