"""Dashboards: W&B, trackio or TensorBoard, each with its local files in the run folder."""

import contextlib
import importlib.util
import io
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TrackioCallback, WandbCallback

from finetune.errors import Problem, RunError
from finetune.recipe import LoggingSettings
from finetune.run.router_load import CAPTION, load_picture
from finetune.run.run_folder import RunFolder
from finetune.upstream import private


@dataclass(frozen=True)
class Dashboards:
    """For the trainer: `trainer_args` for its arguments, `callbacks` for its list; `names` for messages.

    Each callback also takes the routers' load at a logged step (`show_router`); TensorBoard gets the scalars alone.
    """

    names: tuple[str, ...]
    trainer_args: dict[str, Any]
    callbacks: tuple["RunWandbCallback | RunTrackioCallback", ...]


def resolve_report_to(settings: LoggingSettings) -> list[str]:
    """The dashboards by name. "auto" is W&B if an account is set up, else trackio; nothing is sent to determine it."""
    if settings.report_to == "none":
        return []
    if settings.report_to == "auto":
        return ["wandb" if _wandb_account() else "trackio"]
    return list(settings.report_to)


def prepare_dashboards(settings: LoggingSettings, folder: RunFolder) -> Dashboards:
    """Check that every dashboard can be used, before the model is loaded; raises RunError if one cannot.

    Sets environment variables that the dashboards read on import, so call it before they are imported.
    """
    names = resolve_report_to(settings)
    run_name = settings.run_name or folder.path.resolve().name
    callbacks: list[RunWandbCallback | RunTrackioCallback] = []
    if "wandb" in names:
        callbacks.append(_prepare_wandb(settings, run_name, folder.path.resolve()))
    if "trackio" in names:
        callbacks.append(_prepare_trackio(folder.path.resolve() / "trackio"))
    if "tensorboard" in names:
        _prepare_tensorboard(folder.path.resolve() / "tensorboard")
    trainer_args = {
        # W&B and trackio have callbacks of our own; the trainer creates TensorBoard's.
        "report_to": [name for name in names if name == "tensorboard"],
        "run_name": run_name,
        "project": settings.project,
        "trackio_static_space_id": False,
    }
    return Dashboards(tuple(names), trainer_args, tuple(callbacks))


def _wandb_account() -> bool:
    """Whether W&B finds credentials for its server: in the environment, its settings or .netrc. Nothing is sent."""
    import wandb

    authenticate = private("wandb.sdk.lib.wbauth:authenticate_session")

    try:
        # Not wandb.login(verify=False): that asks the server for the user's name in order to print it.
        host = wandb.setup().settings.base_url
        source = "moe-finetune"
        return authenticate(host=host, source=source, prompt=False, update_session=False) is not None
    except wandb.errors.AuthenticationError as error:
        do = "correct it, run `wandb login`, or set logging.report_to: [trackio]"
        raise RunError(Problem("logging.report_to", "W&B's credentials cannot be used", do, got=str(error))) from error
    finally:
        # W&B reads the environment once a session; the run's session starts after it is set.
        wandb.teardown()


def _prepare_wandb(settings: LoggingSettings, run_name: str, folder: Path) -> "RunWandbCallback":
    mode = os.environ.get("WANDB_MODE", settings.wandb_mode)
    if mode not in ("online", "offline"):
        do = "set it to online or offline, or set logging.report_to: none"
        raise RunError(Problem("WANDB_MODE", "a run cannot be recorded in this W&B mode", do, got=mode))
    if mode == "online" and not _wandb_account():
        do = "run `wandb login`, or set logging.report_to: [trackio], or logging.wandb_mode: offline"
        raise RunError(Problem("logging.report_to", "W&B has no account on this machine", do, got="wandb, online"))
    os.environ.update(WANDB_MODE=mode, WANDB_DIR=str(folder), WANDB_PROJECT=settings.project)
    return RunWandbCallback(settings.project, run_name, mode, folder)


def _prepare_trackio(folder: Path) -> "RunTrackioCallback":
    for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        if os.environ.get(variable):
            what, do = "it would send the run to another machine; the recipe did not ask for that", "unset it"
            raise RunError(Problem(variable, what, do, got=os.environ[variable].partition("?")[0]))
    os.environ["TRACKIO_DIR"] = str(folder)
    return RunTrackioCallback(folder)


def _prepare_tensorboard(folder: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        what, do = "TensorBoard is not installed", "pip install tensorboard, or set logging.report_to: [trackio]"
        raise RunError(Problem("logging.report_to", what, do, got="tensorboard"))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)


class _RouterPicture(TrainerCallback):  # type: ignore[misc]
    """Adds an image of the router load to the logged step, for dashboards that show images."""

    _image: Callable[..., Any]  # the dashboard's image class
    _tokens: list[list[int]] | None = None

    def show_router(self, _step: int, load: Mapping[str, Any]) -> None:
        """Keep the load for the next `on_log`."""
        self._tokens = load["tokens"]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The dashboard's own `on_log`, with the image if there is one."""
        tokens, self._tokens = self._tokens, None
        picture = {} if tokens is None else {"router/load": self._image(load_picture(tokens), caption=CAPTION)}
        super().on_log(args, state, control, logs={**(logs or {}), **picture}, **kwargs)


class RunWandbCallback(_RouterPicture, WandbCallback):  # type: ignore[misc]
    """transformers' callback with W&B's files in the run folder; a resumed training continues the same W&B run."""

    def __init__(self, project: str, run_name: str, mode: str, folder: Path) -> None:
        super().__init__()
        self._project, self._run_name, self._mode, self._folder = project, run_name, mode, folder
        self._image = self._wandb.Image

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run on the main process."""
        if state.is_world_process_zero and self._wandb.run is None:
            self._wandb.init(
                project=self._project,
                name=self._run_name,
                mode=self._mode,
                dir=self._folder,
                id=self._run_id(),
                resume="allow",
            )
        super().setup(args, state, model, **kwargs)

    def _run_id(self) -> str:
        path = self._folder / "wandb" / "run-id.txt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class RunTrackioCallback(_RouterPicture, TrackioCallback):  # type: ignore[misc]
    """transformers' callback with trackio's files in the run folder, and one line of output.

    trackio's own output is suppressed: it prints links, in notebooks one with a write token.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._image = self._trackio.Image

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Start the run on the main process and print how to view it."""
        trackio_dir = private("trackio.utils:TRACKIO_DIR")

        if self._folder != trackio_dir:
            what = "trackio was imported before the run folder was known, and writes elsewhere"
            do = "start one run a process, through `finetune train` or `accelerate launch -m finetune.train`"
            raise RunError(Problem(str(self._folder), what, do, got=str(trackio_dir)))
        with contextlib.redirect_stdout(io.StringIO()):
            super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            print(f'trackio: see the curves with  TRACKIO_DIR="{self._folder}" trackio show --project "{args.project}"')

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Wait for the last metrics to be written."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().on_train_end(args, state, control, **kwargs)
