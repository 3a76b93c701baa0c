"""Describe a folder on one screen: an adapter, a checkpoint or a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.adapters.adapter import CONFIG_FILE as ADAPTER_FILE
from finetune.adapters.locate import adapter_folder
from finetune.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from finetune.errors import Problem, WeightsError
from finetune.inspect.inspect_adapter import adapter_lines
from finetune.inspect.inspect_checkpoint import checkpoint_lines
from finetune.inspect.lines import Line, as_text

__all__ = ["inspect"]


def _run_lines(folder: Path) -> list[Line]:
    from finetune.inspect.inspect_run import run_lines  # with transformers' trainer, which a run's callbacks belong to

    return run_lines(folder)


# What tells each kind; the first that fits. A run holds an adapter in a folder of its own.
_KINDS: Sequence[tuple[tuple[str, ...], Callable[[Path], list[Line]]]] = (
    ((ADAPTER_FILE,), adapter_lines),
    ((SINGLE_FILE, INDEX_FILE), checkpoint_lines),
    (("recipe.yaml", "provenance.json"), _run_lines),
)


def inspect(folder: Path) -> str:
    """The lines to print. Reads headers, hashes the files that a list of checksums names, loads no weight.

    `folder`: also `RUN@best`. Raises WeightsError for a folder that is none of the three, and for one that is damaged.
    """
    folder = Path(folder) if Path(folder).exists() else adapter_folder(folder)
    for names, lines in _KINDS:
        if any((folder / name).is_file() for name in names):
            return as_text(lines(folder))
    where, do = str(folder), "give a run's output_dir, RUN/checkpoint-N, RUN@best, an adapter, or a model with weights"
    if not folder.is_dir():
        raise WeightsError(Problem(where, "is not a folder", do))
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"
    raise WeightsError(Problem(where, "is neither an adapter nor a checkpoint in safetensors nor a run", do, got=held))
