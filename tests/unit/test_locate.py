"""A run, `RUN/checkpoint-N` and `RUN@best` in place of an adapter's folder, in everything that reads adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.adapters.adapter import TRAINING_FILES, read_adapter
from finetune.adapters.initial import read_initial_adapter
from finetune.adapters.locate import adapter_folder
from finetune.checkpoint import verify_sums
from finetune.cli.main import main
from finetune.errors import FinetuneError, WeightsError
from finetune.evaluate import evaluate
from finetune.export import export
from finetune.inspect import inspect
from finetune.merge import merge
from tests.unit.runs import MadeRun, make_checkpoint, save_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return save_run(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def run(made: MadeRun, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(made.folder, tmp_path / "run")


def refusal(path: Path) -> str:
    with pytest.raises(FinetuneError) as caught:
        read_adapter(adapter_folder(path))
    return str(caught.value).replace(str(path.parent), "runs")


def test_what_each_name_stands_for(run: Path) -> None:
    assert adapter_folder(run) == run / "adapter"
    assert adapter_folder(run / "adapter") == run / "adapter"
    assert adapter_folder(run / "checkpoint-6") == run / "checkpoint-6"
    assert adapter_folder(f"{run}@best") == run / "checkpoint-4"


def test_a_run_is_found_from_inside_of_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert adapter_folder(".") == Path("adapter")
    assert adapter_folder("./@best") == Path("checkpoint-4")


def test_a_folder_whose_name_holds_an_at_is_that_folder(run: Path) -> None:
    named = run.rename(run.with_name("run@best"))
    assert adapter_folder(named) == named / "adapter"
    assert adapter_folder(f"{named}@best") == named / "checkpoint-4"
    other = shutil.copytree(named / "adapter", named.with_name("me@home"))
    assert adapter_folder(other) == other


def test_a_run_that_is_not_finished(run: Path) -> None:
    shutil.rmtree(run / "adapter")
    assert refusal(run) == (
        "runs/run: the run is not finished, and has no adapter yet; name runs/run@best or runs/run/checkpoint-6 or "
        "runs/run/checkpoint-4, or let the run go on to its end"
    )
    shutil.rmtree(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-6")
    assert refusal(run).endswith("has no adapter yet; start the run's command again: it goes on to the end")


def test_best_where_nothing_was_evaluated(run: Path) -> None:
    for step in (4, 6):
        make_checkpoint(run / f"checkpoint-{step}", best=None)
    assert refusal(run.with_name("run@best")) == (
        "runs/run@best: the run has evaluated nothing, so that no checkpoint is the best; name runs/run or "
        "runs/run/checkpoint-6 or runs/run/checkpoint-4"
    )


def test_best_without_checkpoints_and_of_something_else(run: Path, tmp_path: Path) -> None:
    for name in ("nowhere", ""):
        where = tmp_path / f"{name}@best"
        assert "is not the folder of a run; give the output_dir of a run before @best" in refusal(where)
    shutil.rmtree(run / "checkpoint-4")
    assert refusal(run.with_name("run@best")) == (
        "runs/run@best: the checkpoint of the best evaluation, runs/run/checkpoint-4, is gone; name runs/run or "
        "runs/run/checkpoint-6"
    )
    shutil.rmtree(run / "checkpoint-6")
    assert refusal(run.with_name("run@best")) == "runs/run@best: the run has no checkpoint; name runs/run"


def test_names_that_a_run_does_not_have(run: Path) -> None:
    names = "name runs/run or runs/run@best or runs/run/checkpoint-6 or runs/run/checkpoint-4"
    assert refusal(run.with_name("run@last")) == f"runs/run@last: @last names no adapter of a run; {names}"
    assert refusal(run / "checkpoint-5").replace(str(run.parent), "runs") == (
        f"runs/checkpoint-5: the run has no such checkpoint; {names.replace('runs/run', 'runs')}"
    )


@pytest.mark.parametrize("name", ["trainer_state.json", "router_balance.json"])
def test_best_is_not_guessed_where_the_newest_checkpoint_is_damaged(run: Path, name: str) -> None:
    (run / "checkpoint-6" / name).write_text("{}")
    message = refusal(run.with_name("run@best"))
    assert message.startswith("runs/run@best: checkpoint-6, the newest checkpoint, is damaged, so that the best one")
    assert message.endswith("name runs/run or runs/run/checkpoint-4")


def test_merge_export_and_inspect_read_what_they_need_from_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base, tokenizer and moved router biases are those of the step."""
    merged, exported = tmp_path / "merged", tmp_path / "exported"
    assert main(["merge", f"{run}@best", "--output", str(merged)]) == 0
    report = json.loads((merged / "merge-report.json").read_text())
    assert report["adapters"][0]["name_or_path"] == str(run / "checkpoint-4")
    assert report["adapters"][0]["sha256"] == read_adapter(run / "checkpoint-4").digest()
    assert report["proof"]["moved_biases"] == 2
    assert (merged / "tokenizer.json").read_bytes() == (run / "checkpoint-4" / "tokenizer.json").read_bytes()
    assert not (merged / "trainer_state.json").exists()
    assert main(["export", f"{run}@best", "--format", "peft", "--output", str(exported)]) == 0
    assert verify_sums(exported)
    assert read_adapter(exported).digest() == report["adapters"][0]["sha256"]
    assert not {path.name for path in exported.iterdir()} & set(TRAINING_FILES)
    capsys.readouterr()
    assert main(["inspect", f"{run}@best"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint of a run at step 4; its finished adapter is in {run / 'adapter'}" in said
    assert "can be merged" in said


def test_training_goes_on_from_a_run(run: Path) -> None:
    assert read_initial_adapter(run).folder == run / "adapter"
    initial = read_initial_adapter(Path(f"{run}@best"))
    assert (initial.folder, initial.has_biases) == (run / "checkpoint-4", True)


def test_inspect_shows_the_checkpoints_of_a_run_and_the_best_one(run: Path) -> None:
    said = inspect(run)
    assert "run, finished" in said
    assert "checkpoint-4, checkpoint-6" in said
    assert f"step 4, eval_loss 4.25: {run}@best" in " ".join(said.split())
    assert f"finetune merge {run}" in said
    shutil.rmtree(run / "adapter")
    (run / "checkpoint-6" / "adapter_config.json").write_text("{}")
    said = " ".join(inspect(run).split())
    assert "run, not finished; it can continue from step 4" in said
    assert "checkpoint-4; damaged: checkpoint-6" in said
    assert f"merge finetune merge {run / 'checkpoint-4'}" in said


def test_a_run_is_evaluated_as_it_was_trained(made: MadeRun, tmp_path: Path) -> None:
    """On the base in 4 bits, as a merge into what these stand for."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "light " * (1 + n), "completion": "on"}) + "\n" for n in range(3)))
    named = Path(f"{made.folder}@best")
    merge(named, tmp_path / "merged", into="dequantized", prove=False, show_progress=False)
    best, merged, last = (
        evaluate(model, rows, "prompt_completion") for model in (named, tmp_path / "merged", made.folder)
    )
    assert [row.answer for row in best.answers] == [row.answer for row in merged.answers]
    assert best.load is not None
    torch.testing.assert_close(torch.tensor(best.load), torch.tensor(merged.load))
    assert [row.answer for row in best.answers] != [row.answer for row in last.answers]


def test_an_adapter_without_a_record_is_not_evaluated(made: MadeRun, run: Path) -> None:
    (run / "adapter" / "finetune.json").unlink()
    (run / "adapter" / "SHA256SUMS").unlink()
    with pytest.raises(WeightsError, match=r"does not say what it was trained on: .*; merge it first: finetune merge"):
        evaluate(run, run / "rows.jsonl", "prompt_completion")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "training_state.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_refused_by_everything(run: Path, tmp_path: Path, name: str) -> None:
    damaged = run / "checkpoint-4" / name
    damaged.unlink() if name == "SHA256SUMS" else damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    best = Path(f"{run}@best")
    for read in (
        lambda: merge(best, tmp_path / "out", show_progress=False),
        lambda: export(best, tmp_path / "out", "peft"),
        lambda: inspect(best),
        lambda: read_initial_adapter(best),
        lambda: evaluate(best, run.parent / "rows.jsonl", "prompt_completion"),
    ):
        with pytest.raises(WeightsError, match="SHA256SUMS"):
            read()
    assert not (tmp_path / "out").exists()
