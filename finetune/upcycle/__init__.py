"""Sparse upcycling (arXiv 2212.05055): a dense Llama or Mistral model becomes a Mixtral with copies of its MLP."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune import __version__
from finetune.checkpoint import new_folder, write_sums
from finetune.errors import Problem, RecipeError, WeightsError
from finetune.files import open_regular, require_free_disk, write_json
from finetune.upcycle.dense import DenseSource, check_tensors
from finetune.upcycle.mixtral import Options, plan, write_config, write_weights

GGUF_MAGIC = b"GGUF"


def open_source(path: Path, dtype: str | None) -> DenseSource:
    """A Hugging Face folder or a GGUF file, checked to be a dense Llama or Mistral model. Raises WeightsError."""
    source: DenseSource
    if path.exists() and not path.is_dir():
        _check_gguf_file(path)
        from finetune.upcycle.gguf_source import GgufSource

        source = GgufSource(path, dtype)
    else:
        _check_folder(path)
        from finetune.upcycle.huggingface import HuggingFaceSource

        source = HuggingFaceSource(path, dtype)
    check_tensors(source)
    return source


def _check_gguf_file(path: Path) -> None:
    with open_regular(path) as stream:
        magic = stream.read(4)
    if magic != GGUF_MAGIC:
        do = "give a .gguf file, or the folder that holds config.json and safetensors"
        raise WeightsError(Problem(str(path), "is neither a folder nor a GGUF file", do))


def _check_folder(path: Path) -> None:
    do = "give a local folder with config.json and safetensors, or a .gguf file (nothing is downloaded)"
    if not path.exists():
        raise WeightsError(Problem(str(path), "does not exist", do))
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = "; ".join(f"give {path / name} instead" for name in files[:3]) or do
        raise WeightsError(Problem(str(path), "holds no config.json", hint))


__all__ = ["Options", "Report", "upcycle"]

# config, tokenizer and templates; the largest tokenizers are some 30 MB
COMPANION_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Report:
    """The written checkpoint: total `parameters`, `bytes_written` of weights, `seconds` of wall time."""

    folder: Path
    parameters: int
    bytes_written: int
    seconds: float


def upcycle(source: Path, out: Path, options: Options) -> Report:
    """Write `source` as a Mixtral checkpoint into the new folder `out`; a failure leaves nothing there.

    With `noise` 0 all experts of a layer are equal, and since Mixtral's top-k weights sum to one its logits are the
    dense model's whatever the router says. Raises RecipeError for options, WeightsError for anything on disk.
    """
    started = time.monotonic()
    _check(options)
    dense = open_source(source, options.dtype)
    nbytes = sum(spec.nbytes for piece in plan(dense, options.num_experts) for spec in piece.targets)
    needed = nbytes + COMPANION_BYTES
    with new_folder(out, needed) as folder:
        require_free_disk(out, needed)
        write_config(folder, dense, options)
        dense.write_companions(folder)
        parameters = write_weights(folder, dense, options)
        # To reproduce the model.
        origin = {"source": source.name, "moe_finetune": __version__, **asdict(options)}
        write_json(folder / "upcycle.json", origin)
        write_sums(folder)
    return Report(out, parameters, nbytes, time.monotonic() - started)


def _check(options: Options) -> None:
    problems = []
    if options.num_experts < 2:
        problems.append(Problem("--num-experts", "must be at least 2", "give 2 or more", got=str(options.num_experts)))
    if not 1 <= options.top_k <= options.num_experts:
        do = f"give a number from 1 to --num-experts ({options.num_experts})"
        problems.append(Problem("--top-k", "must lie between 1 and the number of experts", do, got=str(options.top_k)))
    if not (math.isfinite(options.noise) and options.noise >= 0):
        problems.append(Problem("--noise", "must be 0 or more", "give a number such as 0.01", got=str(options.noise)))
    if options.max_shard_bytes < 1:
        problems.append(Problem("--max-shard-size", "must be positive", "give a size such as 2GB"))
    if problems:
        raise RecipeError(problems)
