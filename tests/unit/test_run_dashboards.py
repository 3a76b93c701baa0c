"""Dashboards, for real: a tiny trainer logs, and what W&B and trackio stored is read back with their own tools."""

import contextlib
import json
import multiprocessing
import os
import shlex
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import wandb
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from finetune.errors import RunError
from finetune.recipe import LoggingSettings, load_recipe
from finetune.run import MetricsCallback, read_metrics
from finetune.run.dashboards import RunTensorBoardCallback, prepare_dashboards, resolve_report_to
from finetune.run.run_folder import RunFolder

KEY = "k" * 40
BIN = Path(sys.executable).parent
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart" / "sft-qlora.yaml"


def recipe_as_shown() -> dict[str, Any]:
    return load_recipe(RECIPE, []).model_dump(mode="json")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test sets in the environment, and W&B's process, last as long as the test."""
    before = dict(os.environ)
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def wandb_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")


class OneWeight(torch.nn.Module):
    """loss = (x w)^2: enough of a model for a trainer to log a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((x * self.weight - labels) ** 2).mean()}


def train(settings: LoggingSettings, path: Path, *further: TrainerCallback) -> None:
    folder = RunFolder(path)
    dashboards = prepare_dashboards(settings, folder, recipe_as_shown())
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
    callbacks = [MetricsCallback(folder.metrics), *dashboards.callbacks, *further]
    Trainer(OneWeight(), arguments, train_dataset=rows, callbacks=callbacks).train()
    for callback in dashboards.callbacks:
        callback.finish()


def losses_of(path: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(path / "metrics.jsonl") if "loss" in line]


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """The records of one W&B run, as W&B's own reader gives them."""
    (record,) = folder.glob("*.wandb")
    done = subprocess.run([BIN / "wandb", "leet", "inspect", "--json", record], capture_output=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_config(folder: Path) -> dict[str, Any]:
    """The config that W&B shows, without its own entry on versions."""
    config: dict[str, Any] = {}
    for entry in wandb_records(folder):
        config |= entry.get(entry["type"], {}).get("config", entry.get("config", {})).get("update", {})
    return {key: value for key, value in config.items() if key != "_wandb"}


def wandb_losses(folder: Path) -> list[float]:
    history = [entry["history"]["item"] for entry in wandb_records(folder) if entry.get("type") == "history"]
    return [item["train/loss"] for item in history if "train/loss" in item]


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_wandb_offline_stores_the_run_in_the_run_folder_and_a_resumed_one_continues_it(tmp_path: Path) -> None:
    for _ in range(2):
        train(LoggingSettings(report_to=["wandb"], wandb_mode="offline"), tmp_path)
    losses = losses_of(tmp_path)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    assert wandb_losses(first) == losses[:3]
    assert wandb_config(first) == recipe_as_shown(), "every key of the recipe, and none of TRL's arguments"
    (picture,) = first.glob("files/media/images/train/router/load_*.png")
    assert picture_size(picture) == (32, 16), "the routers' load, a block of 8 pixels for each expert of each layer"
    assert len(set(losses)) == 3, "the weight moved"
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2], "one run id"


def test_trackio_stores_the_run_in_the_run_folder_and_prints_no_link(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ciabatta"
    folder.mkdir()
    # In a process of its own: trackio reads its folder once, on import.
    settings = LoggingSettings(report_to=["trackio"], project="bread")
    process = multiprocessing.get_context("spawn").Process(target=train, args=(settings, folder))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    losses = losses_of(folder)
    printed = "".join(capfd.readouterr())
    command = [str(BIN / "trackio"), "get", "metric", "--project", "bread", "--run", "ciabatta", "--json", "--metric"]
    environment = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run([*command, "train/loss"], capture_output=True, check=True, env=environment)
    assert [entry["value"] for entry in json.loads(done.stdout)["values"]] == losses
    with contextlib.closing(sqlite3.connect(folder / "trackio" / "bread.db")) as database:
        (config,) = database.execute("select config from configs").fetchone()
    shown = {key: value for key, value in json.loads(config).items() if not key.startswith("_")}
    assert shown == recipe_as_shown()
    (picture,) = folder.glob("trackio/media/**/*.png")
    assert picture_size(picture) == (32, 16)
    assert f'TRACKIO_DIR="{folder}/trackio" trackio show --project "bread"' in printed
    assert "http" not in printed
    assert "write_token" not in printed


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
    prepared = prepare_dashboards(LoggingSettings(report_to="none", run_name="rye"), RunFolder(tmp_path), {})
    assert prepared.callbacks == ()
    assert (prepared.trainer_args["report_to"], prepared.trainer_args["run_name"]) == ([], "rye")


def refusal(settings: LoggingSettings, path: Path) -> str:
    with pytest.raises(RunError) as error:
        prepare_dashboards(settings, RunFolder(path), {})
    return str(error.value)


VIEWER = {"viewer": {"id": "1", "username": "baker", "entity": "bakery", "flags": "{}", "teams": {"edges": []}}}
PROJECT = {"id": "p", "name": "bread", "entity": {"id": "e", "name": "bakery"}}
RUN: dict[str, Any] = {"id": "r", "name": "r", "displayName": "rye", "config": "{}", "project": PROJECT}
ANSWERS = {
    "Viewer": VIEWER,
    "RunResumeStatus": {"model": None},
    "UpsertBucket": {"upsertBucket": {"bucket": RUN, "inserted": True}},
}


@contextlib.contextmanager
def wandb_server(*answered: str, otherwise: int) -> Iterator[str]:
    """A server that answers these questions of W&B's client, and everything else with an HTTP error."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            question: dict[str, Any] = json.loads(body) if self.path == "/graphql" else {"query": "no question"}
            query = question["query"].split()[1].partition("(")[0]
            if query == "UpsertBucket":
                RUN["name"] = question["variables"]["name"]
            self.send_response(200 if query in answered else otherwise)
            self.send_header("content-type", "application/json")
            self.end_headers()
            error = {"errors": [{"message": "user is not logged in"}]}
            self.wfile.write(json.dumps({"data": ANSWERS[query]} if query in answered else error).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextlib.contextmanager
def server_that_never_answers() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


UNUSABLE: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[str]], str | None, str]] = {
    "nothing listens": (lambda: contextlib.nullcontext("http://127.0.0.1:9"), KEY, "did not respond in time"),
    "no answer": (server_that_never_answers, KEY, "did not respond in time"),
    "wrong key": (lambda: wandb_server(otherwise=401), KEY, "user is not logged in"),
    "malformed key": (lambda: wandb_server(otherwise=401), "tooshort", "API key must have 40+ characters, has 8"),
    "no key": (lambda: wandb_server(otherwise=401), None, "no account on this machine: run `wandb login`"),
}


@pytest.mark.usefixtures("wandb_online")
@pytest.mark.parametrize("case", UNUSABLE)
def test_wandb_that_cannot_be_used_is_offline_before_the_model_is_loaded(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, key, reason = UNUSABLE[case]
    settings = LoggingSettings(report_to=["wandb"]) if key is None else LoggingSettings()
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    began = time.monotonic()
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert prepare_dashboards(settings, RunFolder(tmp_path / "a run"), {}).names == ("wandb",)
    assert time.monotonic() - began < 5
    assert os.environ["WANDB_MODE"] == "offline"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("W&B cannot be used now (")
    assert reason in line
    assert line.endswith(
        f"; the run goes on with W&B offline; upload it later with  wandb sync '{tmp_path}/a run/wandb'/offline-run-*"
    )
    assert key is None or key not in line


@pytest.mark.usefixtures("wandb_online")
def test_wandb_that_refuses_the_run_at_its_start_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server("Viewer", otherwise=401) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        train(LoggingSettings(), tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert line.startswith("W&B cannot be used now (CommError: ")
    advised = shlex.split(line.rpartition("wandb sync ")[2])
    (run,) = Path("/").glob(advised[0].lstrip("/"))
    assert wandb_losses(run) == losses_of(tmp_path)


@pytest.mark.usefixtures("wandb_online")
def test_wandb_whose_server_fails_in_the_middle_does_not_delay_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    began = time.monotonic()
    with wandb_server(*ANSWERS, otherwise=500) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        train(LoggingSettings(), tmp_path)
    assert time.monotonic() - began < 20
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B")]
    assert line.startswith("W&B has not uploaded everything (TimeoutError: ")
    run = Path(shlex.split(line.rpartition("wandb sync ")[2])[0])
    assert len(wandb_losses(run)) == 3


class EndWandbsProcess(TrainerCallback):  # type: ignore[misc]
    """Ends the process that writes W&B's files, as a full memory does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the first step."""
        for process in psutil.Process().children(recursive=True):
            if state.global_step == 1 and process.name() == "wandb-core":
                process.kill()
                process.wait()


def test_an_error_of_a_dashboard_in_the_middle_ends_the_dashboard_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module("trackio")  # before the run's folder is known: an error at its start
    train(LoggingSettings(report_to=["wandb", "trackio"]), tmp_path, EndWandbsProcess())
    lines = capsys.readouterr().out.splitlines()
    (trackio,) = [line for line in lines if line.startswith("trackio")]
    assert trackio.startswith("trackio records nothing more (RunError: ")
    (first, second) = [line for line in lines if line.startswith("W&B")]
    assert first.startswith("W&B records nothing more (")
    assert first.endswith("); the run goes on; see metrics.jsonl")
    assert second.startswith("W&B has not uploaded everything (")
    assert len(losses_of(tmp_path)) == 3


class Writer:
    """tensorboardX's writer, as far as the callback uses it; a second scalar finds the disk full."""

    written: list[tuple[Any, ...]] = []  # noqa: RUF012 -- of the class: the callback makes the object

    def __init__(self, log_dir: str) -> None:
        self.written.append(("folder", log_dir))

    def add_text(self, *values: Any) -> None:
        self.written.append(values)

    def add_scalar(self, *values: Any) -> None:
        if "train/epoch" in values:
            raise OSError("No space left on device")
        self.written.append(values)


def test_tensorboard_shows_the_recipe_and_its_full_disk_ends_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = SimpleNamespace(SummaryWriter=Writer, __spec__=ModuleSpec("tensorboardX", None))
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    callback = RunTensorBoardCallback(tmp_path / "tensorboard", recipe_as_shown())
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback.on_train_begin(None, state, None)
    for _ in range(2):
        callback.on_log(None, state, None, logs={"loss": 1.0, "epoch": 1.0})
    folder, (tag, text), loss = Writer.written
    assert folder == ("folder", str(tmp_path / "tensorboard"))
    assert (tag, json.loads(text)) == ("recipe", recipe_as_shown())
    assert loss == ("train/loss", 1.0, 1)
    assert capsys.readouterr().out == (
        "TensorBoard records nothing more (OSError: No space left on device); the run goes on; see metrics.jsonl\n"
    )


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
