"""Check that files are unchanged.

SHA-256 sums of a folder's files in the format of `sha256sum`; and a fingerprint of a checkpoint's weights that does not
depend on their sharding.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from finetune.checkpoint.reader import CheckpointReader, TensorInfo
from finetune.errors import Problem, WeightsError
from finetune.files import open_regular, read_regular, write_text

SUMS_FILE = "SHA256SUMS"
NOT_LISTED = (SUMS_FILE, "README.md")  # users edit the latter
CHUNK_BYTES = 2**20
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")


def write_sums(
    folder: Path, to_come: Mapping[str, str] | None = None, advance: Callable[[int], object] = lambda _: None
) -> None:
    """List every file of the folder except its README and hidden ones; `to_come`: texts that are written later."""
    visible = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    files = sorted(file for file in visible if file.name not in NOT_LISTED)
    sums = dict(zip((file.name for file in files), _sums(files, advance), strict=True))
    sums |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (to_come or {}).items()}
    write_text(folder / SUMS_FILE, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def listed_bytes(folder: Path) -> int:
    """Bytes that `verify_sums` will read; 0 without a list."""
    return sum((folder / name).stat().st_size for name in _read(folder) if (folder / name).is_file())


def listed_files(folder: Path) -> set[str]:
    """Names of the files in the folder's list; none without a list."""
    return set(_read(folder))


def verify_sums(folder: Path, advance: Callable[[int], object] = lambda _: None) -> bool:
    """Check the folder's files against its list; False if it has none. WeightsError with every file that differs."""
    wanted = _read(folder)
    if not wanted:
        return False
    problems = [
        Problem(str(folder / name), f"is missing, and {SUMS_FILE} lists it", "fetch or copy the folder again")
        for name in wanted
        if not (folder / name).is_file()
    ]
    present = [folder / name for name in wanted if (folder / name).is_file()]
    do = f"fetch or copy the file again; if it was changed on purpose, take its line out of {SUMS_FILE}"
    problems += [
        Problem(str(file), f"differs from its sum in {SUMS_FILE}", do, got=actual[:12])
        for file, actual in zip(present, _sums(present, advance), strict=True)
        if actual != wanted[file.name]
    ]
    if problems:
        raise WeightsError(problems)
    return True


def _read(folder: Path) -> dict[str, str]:
    file = folder / SUMS_FILE
    if not file.exists():
        return {}
    sums = {}
    for number, line in enumerate(read_regular(file).decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).name != match[2]:
            what, do = "is not a SHA-256 sum and the name of a file beside it", "fetch or copy the folder again"
            raise WeightsError(Problem(f"{file}:{number}", what, do, got=line[:80]))
        sums[match[2]] = match[1]
    return sums


def _sums(files: list[Path], advance: Callable[[int], object]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return list(pool.map(lambda file: _sum(file, advance), files))


def _sum(file: Path, advance: Callable[[int], object]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK_BYTES)
    with open_regular(file) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


WINDOW_BYTES = 4096
WINDOWS = 16


def fingerprint(folder: Path) -> str:
    """sha256 (hex) over every tensor's key, dtype, shape and sampled content; seconds for 100 GB.

    Content is sampled in 16 windows of 4 KiB spread evenly over the tensor, first and last bytes included; smaller
    tensors are read whole. Two fine-tunes of one base differ everywhere in their trained tensors.
    """
    reader = CheckpointReader(Path(folder))
    digest = hashlib.sha256()
    streams: dict[Path, IO[bytes]] = {}
    try:
        for key in sorted(reader.keys):
            info = reader.info(key)
            digest.update(f"{key}\0{info.dtype}\0{list(info.shape)}\0".encode())
            if info.file not in streams:
                streams[info.file] = open_regular(info.file)
            _sample(digest.update, streams[info.file], info)
    finally:
        for stream in streams.values():
            stream.close()
    return digest.hexdigest()


def _sample(update: Callable[[bytes], None], stream: IO[bytes], info: TensorInfo) -> None:
    if info.nbytes <= WINDOWS * WINDOW_BYTES:
        offsets, length = [0], info.nbytes
    else:
        last = info.nbytes - WINDOW_BYTES
        offsets, length = [last * window // (WINDOWS - 1) for window in range(WINDOWS)], WINDOW_BYTES
    for offset in offsets:
        stream.seek(info.offset + offset)
        update(stream.read(length))
