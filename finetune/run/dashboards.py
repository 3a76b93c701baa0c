"""Dashboards: W&B, trackio or TensorBoard, each with its local files in the run folder.

None of them stops or delays a run: what fails before the model is loaded is said there, what fails later ends the
dashboard. `metrics.jsonl` has every figure in any case.
"""

import contextlib
import importlib.util
import io
import json
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from finetune.errors import Problem, RunError
from finetune.recipe import LoggingSettings
from finetune.run.router_load import CAPTION, load_picture
from finetune.run.run_folder import RunFolder
from finetune.upstream import private

# Seconds that W&B may take to start a run and to upload the rest at its end, unless the environment says otherwise.
# `WANDB_HTTP_TIMEOUT` (10) limits the question before the model is loaded.
_WANDB_LIMITS = {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "60", "WANDB_FINISH_TIMEOUT_RAISES": "true"}


@dataclass(frozen=True)
class Dashboards:
    """For the trainer: `trainer_args` for its arguments, `callbacks` for its list; `names` for messages.

    Each callback also takes the routers' load at a logged step (`show_router`); TensorBoard gets the scalars alone.
    """

    names: tuple[str, ...]
    trainer_args: dict[str, Any]
    callbacks: tuple["_DashboardCallback", ...]


def resolve_report_to(settings: LoggingSettings) -> list[str]:
    """The dashboards by name. "auto" is W&B if an account is set up, else trackio; nothing is sent to determine it."""
    if settings.report_to == "none":
        return []
    if settings.report_to == "auto":
        return ["wandb" if _wandb_account() else "trackio"]
    return list(settings.report_to)


def prepare_dashboards(settings: LoggingSettings, folder: RunFolder, config: Mapping[str, Any]) -> Dashboards:
    """Find out which dashboards can be used, before the model is loaded; `config` is what they show as the run's.

    Raises RunError for settings that no run can have. Sets environment variables that the dashboards read on import,
    so call it before they are imported.
    """
    names = resolve_report_to(settings)
    run_name = settings.run_name or folder.path.resolve().name
    path = folder.path.resolve()
    callbacks: list[_DashboardCallback] = []
    if "wandb" in names:
        callbacks.append(_prepare_wandb(settings, run_name, path, config))
    if "trackio" in names:
        callbacks.append(_prepare_trackio(path / "trackio", config))
    if "tensorboard" in names:
        callbacks.append(_prepare_tensorboard(path / "tensorboard", config))
    trainer_args = {
        "report_to": [],  # the callbacks here replace transformers' own
        "run_name": run_name,
        "project": settings.project,
        "trackio_static_space_id": False,
    }
    return Dashboards(tuple(names), trainer_args, tuple(callbacks))


def _wandb_account() -> bool:
    """Whether W&B finds credentials, valid or not, for its server: in the environment, its settings or .netrc."""
    import wandb

    try:
        return _credentials(verify=False) is not None
    except wandb.errors.AuthenticationError:
        return True


def _credentials(verify: bool) -> Any:
    """W&B's credentials, None without any. With `verify` its server is asked, which takes at most
    `WANDB_HTTP_TIMEOUT` seconds. Raises wandb.errors.AuthenticationError."""
    import wandb

    authenticate = private("wandb.sdk.lib.wbauth:authenticate_session")

    try:
        # Not wandb.login: that prints, and asks the server for the user's name even with verify=False.
        host = wandb.setup().settings.base_url
        return authenticate(host=host, source="moe-finetune", verify=verify, prompt=False, update_session=False)
    finally:
        # W&B reads the environment once a session; the run's session starts after it is set.
        wandb.teardown()


def _why_offline() -> str | None:
    """Why a run cannot be sent to W&B now, None if it can."""
    try:
        return None if _credentials(verify=True) is not None else "no account on this machine: run `wandb login`"
    except Exception as error:
        return _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _print_offline(reason: str, folder: Path) -> None:
    upload = f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*"
    print(f"W&B cannot be used now ({reason}); the run goes on with W&B offline; upload it later with  {upload}")


def _prepare_wandb(
    settings: LoggingSettings, run_name: str, folder: Path, config: Mapping[str, Any]
) -> "RunWandbCallback":
    mode = os.environ.get("WANDB_MODE", settings.wandb_mode)
    if mode not in ("online", "offline"):
        do = "set it to online or offline, or set logging.report_to: none"
        raise RunError(Problem("WANDB_MODE", "a run cannot be recorded in this W&B mode", do, got=mode))
    # Only the main process records.
    if mode == "online" and PartialState().is_main_process and (reason := _why_offline()):
        mode = "offline"
        _print_offline(reason, folder)
    os.environ.update(WANDB_MODE=mode, WANDB_DIR=str(folder), WANDB_PROJECT=settings.project)
    for variable, limit in _WANDB_LIMITS.items():
        os.environ.setdefault(variable, limit)
    return RunWandbCallback(settings.project, run_name, mode, folder, config)


def _prepare_trackio(folder: Path, config: Mapping[str, Any]) -> "RunTrackioCallback":
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        if os.environ.get(variable):
            what, do = "it would send the run to another machine; the recipe did not ask for that", "unset it"
            raise RunError(Problem(variable, what, do, got=os.environ[variable].partition("?")[0]))
    os.environ["TRACKIO_DIR"] = str(folder)
    return RunTrackioCallback(folder, config)


def _prepare_tensorboard(folder: Path, config: Mapping[str, Any]) -> "RunTensorBoardCallback":
    if importlib.util.find_spec("tensorboard") is None:
        what, do = "TensorBoard is not installed", "pip install tensorboard, or set logging.report_to: [trackio]"
        raise RunError(Problem("logging.report_to", what, do, got="tensorboard"))
    return RunTensorBoardCallback(folder, config)


class _DashboardCallback(TrainerCallback):  # type: ignore[misc]
    """In front of a callback of transformers: the config is the recipe, and an error ends the dashboard, not the run.

    Adds an image of the router load to the logged step, for dashboards that show images.
    """

    _name: str
    _image: Callable[..., Any] | None = None  # the dashboard's image class
    _tokens: list[list[int]] | None = None
    _failed = False

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run on the main process."""
        raise NotImplementedError

    def finish(self) -> None:
        """Called once, when the run has written everything else."""

    def show_router(self, _step: int, load: Mapping[str, Any]) -> None:
        """Keep the load for the next `on_log`."""
        self._tokens = load["tokens"]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start the run, unless a figure that was logged before the training has started it."""
        if not getattr(self, "_initialized", False):  # TensorBoard has no such mark
            self._attempt(self.setup, args, state, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The dashboard's own `on_log`, with the image if there is one."""
        tokens, self._tokens = self._tokens, None
        picture = {}
        if tokens is not None and self._image is not None:
            picture = {"router/load": self._image(load_picture(tokens), caption=CAPTION)}
        self._attempt(super().on_log, args, state, control, logs={**(logs or {}), **picture}, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The dashboard's own `on_save`."""
        self._attempt(super().on_save, args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The dashboard's own `on_train_end`."""
        self._attempt(super().on_train_end, args, state, control, **kwargs)

    def _attempt(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self._failed:
            return
        try:
            event(*args, **kwargs)
        except Exception as error:  # of any package below, and of its files and processes
            self._failed = True
            print(f"{self._name} records nothing more ({_one_line(error)}); the run goes on; see metrics.jsonl")


class RunWandbCallback(_DashboardCallback, WandbCallback):  # type: ignore[misc]
    """transformers' callback with W&B's files in the run folder; a resumed training continues the same W&B run."""

    _name = "W&B"

    def __init__(self, project: str, run_name: str, mode: str, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._project, self._run_name, self._mode, self._folder = project, run_name, mode, folder
        self._config = config
        self._image = self._wandb.Image

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run on the main process, offline where it does not start online."""
        self._initialized = True
        if not state.is_world_process_zero:
            return
        try:
            self._start(self._mode)
        except Exception as error:
            if self._mode == "offline":
                raise
            _print_offline(_one_line(error), self._folder)
            self._wandb.teardown()  # its process still holds the id of the run that did not start
            self._start("offline")
        # Not in init: of a resumed run it would keep the values of the first start.
        self._wandb.config.update(dict(self._config), allow_val_change=True)
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)

    def finish(self) -> None:
        """Upload the rest; say how to do it later where that takes too long."""
        if (run := self._wandb.run) is None:
            return
        try:
            run.finish()
        except Exception as error:
            upload = shlex.quote(str(Path(run.dir).parent))
            print(f"W&B has not uploaded everything ({_one_line(error)}); upload it later with  wandb sync {upload}")
            with contextlib.suppress(Exception):
                self._wandb.teardown()  # else at exit, with a traceback where W&B's process has died

    def _start(self, mode: str) -> None:
        self._wandb.init(
            project=self._project, name=self._run_name, mode=mode, dir=self._folder, id=self._run_id(), resume="allow"
        )

    def _run_id(self) -> str:
        path = self._folder / "wandb" / "run-id.txt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class RunTrackioCallback(_DashboardCallback, TrackioCallback):  # type: ignore[misc]
    """transformers' callback with trackio's files in the run folder, and one line of output.

    trackio's own output is suppressed: it prints links, in notebooks one with a write token.
    """

    _name = "trackio"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._folder, self._config = folder, config
        self._image = self._trackio.Image

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run on the main process and print how to view it."""
        trackio_dir = private("trackio.utils:TRACKIO_DIR")

        if self._folder != trackio_dir:
            what = "trackio was imported before the run folder was known, and writes elsewhere"
            do = "start one run a process, through `finetune train` or `accelerate launch -m finetune.train`"
            raise RunError(Problem(str(self._folder), what, do, got=str(trackio_dir)))
        self._initialized = True
        if not state.is_world_process_zero:
            return
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.init(project=args.project, name=args.run_name, config=dict(self._config), resume="allow")
        print(f'trackio: see the curves with  TRACKIO_DIR="{self._folder}" trackio show --project "{args.project}"')

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Wait for the last metrics to be written."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().on_train_end(args, state, control, **kwargs)


class RunTensorBoardCallback(_DashboardCallback, TensorBoardCallback):  # type: ignore[misc]
    """transformers' callback with TensorBoard's files in the run folder, and the recipe as its text."""

    _name = "TensorBoard"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.logging_dir, self._config = str(folder), config

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Open the writer on the main process."""
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir)
            self.tb_writer.add_text("recipe", json.dumps(self._config, indent=2))
