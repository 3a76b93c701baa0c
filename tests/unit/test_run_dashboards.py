"""Dashboards, for real: a tiny trainer logs, and what W&B and trackio stored is read back with their own tools."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image
from transformers import Trainer, TrainingArguments

from finetune.errors import RunError
from finetune.recipe import LoggingSettings
from finetune.run.dashboards import prepare_dashboards, resolve_report_to
from finetune.run.metrics import MetricsCallback, read_metrics
from finetune.run.run_folder import RunFolder

KEY = "k" * 40
BIN = Path(sys.executable).parent


class OneWeight(torch.nn.Module):
    """loss = (x w)^2: enough of a model for a trainer to log a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x * self.weight - labels) ** 2).mean()}


def train(settings: LoggingSettings, path: Path, times: int) -> None:
    """In a process of its own: the dashboards read their environment once."""
    for _ in range(times):
        train_once(settings, path)
        wandb.finish()


def train_once(settings: LoggingSettings, path: Path) -> None:
    folder = RunFolder(path)
    dashboards = prepare_dashboards(settings, folder)
    arguments = TrainingArguments(
        output_dir=str(path),
        max_steps=3,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **dashboards.trainer_args,
    )
    rows: Any = [{"x": torch.tensor([float(index)]), "labels": torch.tensor([0.0])} for index in range(1, 9)]
    for callback in dashboards.callbacks:
        callback.show_router(1, {"tokens": [[4, 4, 0, 0], [2, 2, 2, 2]]})
    callbacks = [MetricsCallback(folder.metrics), *dashboards.callbacks]
    Trainer(OneWeight(), arguments, train_dataset=rows, callbacks=callbacks).train()


def train_in_a_process(settings: LoggingSettings, path: Path, times: int = 1) -> list[float]:
    """The losses of `metrics.jsonl`."""
    process = multiprocessing.get_context("spawn").Process(target=train, args=(settings, path, times))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    return [line["loss"] for line in read_metrics(path / "metrics.jsonl") if "loss" in line]


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """History records of one W&B run, as W&B's own reader gives them."""
    (record,) = folder.glob("*.wandb")
    done = subprocess.run([BIN / "wandb", "leet", "inspect", "--json", record], capture_output=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [entry for entry in records if entry.get("type") == "history"]


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_wandb_offline_stores_the_run_in_the_run_folder_and_a_resumed_one_continues_it(tmp_path: Path) -> None:
    losses = train_in_a_process(LoggingSettings(report_to=["wandb"], wandb_mode="offline"), tmp_path, times=2)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    logged = [entry["history"]["item"].get("train/loss") for entry in wandb_history(first)]
    assert logged[:3] == losses[:3]
    (picture,) = first.glob("files/media/images/train/router/load_*.png")
    assert picture_size(picture) == (32, 16), "the routers' load, a block of 8 pixels for each expert of each layer"
    assert len(set(losses)) == 3, "the weight moved"
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2], "one run id"


def test_trackio_stores_the_run_in_the_run_folder_and_prints_no_link(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ciabatta"
    folder.mkdir()
    losses = train_in_a_process(LoggingSettings(report_to=["trackio"], project="bread"), folder)
    printed = "".join(capfd.readouterr())
    command = [str(BIN / "trackio"), "get", "metric", "--project", "bread", "--run", "ciabatta", "--json", "--metric"]
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run([*command, "train/loss"], capture_output=True, check=True, env=environment)
    assert [entry["value"] for entry in json.loads(done.stdout)["values"]] == losses
    (picture,) = folder.glob("trackio/media/**/*.png")
    assert picture_size(picture) == (32, 16)
    assert f'TRACKIO_DIR="{folder}/trackio" trackio show --project "bread"' in printed
    assert "http" not in printed
    assert "write_token" not in printed


@pytest.fixture
def wandb_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")


@pytest.mark.usefixtures("wandb_online")
def test_auto_is_wandb_with_an_account_and_trackio_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_report_to(LoggingSettings()) == ["trackio"]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert resolve_report_to(LoggingSettings()) == ["wandb"]


@pytest.mark.usefixtures("wandb_online")
def test_an_account_in_netrc_counts_and_its_server_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with socket.create_server(("localhost", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{server.getsockname()[1]}")
        (tmp_path / "netrc").write_text(f"machine localhost:{server.getsockname()[1]} login user password {KEY}\n")
        assert resolve_report_to(LoggingSettings()) == ["wandb"]
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_none_and_a_list_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve_report_to(LoggingSettings(report_to="none")) == []
    assert resolve_report_to(LoggingSettings(report_to=["trackio", "wandb"])) == ["trackio", "wandb"]
    prepared = prepare_dashboards(LoggingSettings(report_to="none", run_name="rye"), RunFolder(tmp_path))
    assert prepared.callbacks == ()
    assert (prepared.trainer_args["report_to"], prepared.trainer_args["run_name"]) == ([], "rye")


def refusal(settings: LoggingSettings, path: Path) -> str:
    with pytest.raises(RunError) as error:
        prepare_dashboards(settings, RunFolder(path))
    return str(error.value)


@pytest.mark.usefixtures("wandb_online")
def test_wandb_online_without_an_account_is_refused_at_once(tmp_path: Path) -> None:
    assert refusal(LoggingSettings(report_to=["wandb"]), tmp_path) == (
        "logging.report_to: W&B has no account on this machine; got wandb, online; run `wandb login`, or set "
        "logging.report_to: [trackio], or logging.wandb_mode: offline"
    )


@pytest.mark.usefixtures("wandb_online")
def test_a_malformed_key_is_refused_without_printing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tooshort")
    message = refusal(LoggingSettings(), tmp_path)
    assert message.startswith("logging.report_to: W&B's credentials cannot be used; got WANDB_API_KEY invalid: ")
    assert "tooshort" not in message


def test_a_wandb_mode_that_records_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert refusal(LoggingSettings(report_to=["wandb"]), tmp_path) == (
        "WANDB_MODE: a run cannot be recorded in this W&B mode; got disabled; set it to online or offline, "
        "or set logging.report_to: none"
    )


def test_a_variable_that_would_send_trackios_run_away_is_refused_without_its_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://host.example.org?write_token=secret")
    assert refusal(LoggingSettings(report_to=["trackio"]), tmp_path) == (
        "TRACKIO_SERVER_URL: it would send the run to another machine; the recipe did not ask for that; "
        "got http://host.example.org; unset it"
    )


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="TensorBoard is installed")
def test_tensorboard_where_it_is_not_installed_is_refused(tmp_path: Path) -> None:
    assert refusal(LoggingSettings(report_to=["tensorboard"]), tmp_path) == (
        "logging.report_to: TensorBoard is not installed; got tensorboard; pip install tensorboard, "
        "or set logging.report_to: [trackio]"
    )
