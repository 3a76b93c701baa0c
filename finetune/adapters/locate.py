"""The adapter folder that a path stands for: a folder, a run, one of the run's checkpoints, or `RUN@best`."""

import re
from pathlib import Path

from finetune.adapters.adapter import CONFIG_FILE
from finetune.errors import FinetuneError, Problem, RunError

BEST = "@best"
SHOWN_CHECKPOINTS = 3
_OF_A_RUN = ("recipe.yaml", "identity.json", "metrics.jsonl", f"adapter/{CONFIG_FILE}")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def adapter_folder(path: str | Path) -> Path:
    """The folder with the adapter of `path`, which its reader verifies.

    `path`: such a folder; a run, whose finished adapter it is; `RUN/checkpoint-N`; or `RUN@best`, the checkpoint with
    the best evaluation, unless a folder has that very name. Raises RunError where a run has no such adapter. Anything
    else is returned as it is: what reads it says what is missing there.
    """
    path = Path(path)
    if path.exists():
        return _finished(path) if is_run(path) else path
    run, at, which = str(path).rpartition("@")
    if at + which == BEST:
        return best_checkpoint(Path(run))
    if at and is_run(Path(run)):
        raise RunError(Problem(str(path), f"@{which} names no adapter of a run", _choices(Path(run))))
    if _CHECKPOINT.fullmatch(path.name) and is_run(path.parent):
        raise RunError(Problem(str(path), "the run has no such checkpoint", _choices(path.parent)))
    return path


def is_run(folder: Path) -> bool:
    """Whether a training wrote its files there."""
    if (folder / CONFIG_FILE).is_file() or (folder / "config.json").is_file():
        return False
    return any((folder / name).is_file() for name in _OF_A_RUN)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the best evaluation; RunError where there is none, or where it is not known."""
    from finetune.run.checkpoints import best_of, check_whole, checkpoint_folder, checkpoints

    where = f"{run}{BEST}"
    if not is_run(run):
        raise RunError(Problem(where, f"{run} is not the folder of a run", "give the output_dir of a run before @best"))
    present = checkpoints(run)
    if not present:
        raise RunError(Problem(where, "the run has no checkpoint", _choices(run)))
    newest = present[max(present)]
    try:
        check_whole(newest)  # its state says which one is the best
        best = best_of(newest)
    except FinetuneError as error:
        what = f"{newest.name}, the newest checkpoint, is damaged, so that the best one is not known"
        raise RunError(Problem(where, what, _choices(run), got=str(error.problems[0]))) from error
    if best is None:
        what, do = "the run has evaluated nothing, so that no checkpoint is the best", _choices(run)
        raise RunError(Problem(where, what, do))
    folder = checkpoint_folder(run, best.step)
    if not folder.is_dir():
        raise RunError(Problem(where, f"the checkpoint of the best evaluation, {folder}, is gone", _choices(run)))
    return folder


def _finished(run: Path) -> Path:
    adapter = run / "adapter"
    if not adapter.is_dir():
        raise RunError(Problem(str(run), "the run is not finished, and has no adapter yet", _choices(run)))
    return adapter


def _choices(run: Path) -> str:
    """What to do: name an adapter that the run has, or let it go on."""
    from finetune.run.checkpoints import best_of, newest_step, whole_checkpoints

    whole = dict(whole_checkpoints(run))
    names = [str(run)] if (run / "adapter").is_dir() else []
    newest = whole.get(newest_step(run) or 0)
    if newest is not None and (best := best_of(newest)) and best.step in whole:
        names.append(f"{run}{BEST}")
    names += [str(folder) for folder in list(whole.values())[:SHOWN_CHECKPOINTS]]
    if not names:
        return "start the run's command again: it goes on to the end"
    return f"name {' or '.join(names)}" + ("" if (run / "adapter").is_dir() else ", or let the run go on to its end")
