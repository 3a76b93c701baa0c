"""Export an adapter for PEFT: a verified copy of its folder."""

import shutil
from pathlib import Path

from finetune.adapters.adapter import CONFIG_FILE, TRAINING_FILES, WEIGHTS_FILE, Adapter
from finetune.adapters.record import RECORD_FILE
from finetune.checkpoint import SUMS_FILE
from finetune.checkpoint.reader import PICKLES, read_header, read_tensor
from finetune.errors import Problem, WeightsError
from finetune.files import write_text


def copy(adapter: Adapter, folder: Path) -> list[str]:
    """Copy every file of the adapter's folder; returns their names, those that PEFT reads first.

    Links become files; pickles are refused. Of a checkpoint what the run needs to continue is left out. Raises
    WeightsError for factors that are not finite.
    """
    source = adapter.folder
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name not in TRAINING_FILES)
    if pickles := [str(path.relative_to(source)) for path in files if path.suffix in PICKLES]:
        do = "remove them from the adapter's folder: they can run code, and PEFT does not need them"
        raise WeightsError(Problem(str(source), "holds pickle files", do, got=", ".join(pickles[:3])))
    require_finite(source / WEIGHTS_FILE)
    names = []
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        names.append(str(path.relative_to(source)))
    _shorten_sums(folder / SUMS_FILE)
    first = [name for name in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE) if name in names]
    return [*first, *(name for name in names if name not in first)]


def _shorten_sums(file: Path) -> None:
    """Take what was left out from the list of checksums."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(file, "".join(line for line in lines if line.split()[-1] not in TRAINING_FILES))


def require_finite(file: Path) -> None:
    """Raise WeightsError for factors that are not."""
    for key, info in read_header(file).items():
        if not read_tensor(info).isfinite().all():
            raise WeightsError(Problem(f"{file}: {key}", "not finite", "train again, or take an earlier checkpoint"))
