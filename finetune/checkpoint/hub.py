"""The local folder of a checkpoint that is named by its folder or by its id on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE

from finetune.errors import DiskError, Problem, WeightsError, disk_problem

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "tokenizer*"]


def resolve_checkpoint(
    name_or_path: str, revision: str | None = None, *, weights: bool = True, where: str = "model.name_or_path"
) -> Path:
    """The local folder of a checkpoint; a hub id is fetched (safetensors, never pickles).

    Without `weights` only its config and its tokenizer are fetched. `where`: what messages call the name.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name_or_path.count("/") != 1 or name_or_path.startswith("."):
        do = "give a checkpoint folder or a hub id owner/name"
        raise WeightsError(Problem(where, "no such folder", do, got=str(folder)))
    patterns = [*_SMALL_FILES, "*.safetensors"] if weights else _SMALL_FILES
    try:
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        if problem := disk_problem(error, Path(HF_HUB_CACHE), elsewhere="set HF_HOME to a folder on another disk"):
            raise DiskError(problem) from error
        do = "check the path or hub id, the network and, for gated models, `hf auth login`"
        if is_offline_mode():
            do = "check the path or hub id; HF_HUB_OFFLINE is set: unset it, or fetch the model first"
        what = f"neither a folder here nor a model that can be fetched ({type(error).__name__})"
        raise WeightsError(Problem(where, what, do, got=name_or_path)) from error
