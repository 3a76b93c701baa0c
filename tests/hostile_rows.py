"""Files of rows that are damaged at random, and what reading each comes to, in a process of its own.

`python -m tests.hostile_rows FOLDER` reads every entry of the folder and prints a JSON object for each. One warm
process forks: a crash, a file that does not end or one that takes the memory is an outcome as any other.
"""

import gzip
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SECONDS, MEMORY = 20, 1 << 30
"""Bounds of one file: CPU time, and bytes of memory above what the process has before."""

_KEPT = 5  # messages


@dataclass
class Outcome:
    """`rows` that were sound, the `messages` of the others, or what ended the process: `died`."""

    name: str
    rows: int = 0
    messages: list[str] = field(default_factory=list)
    died: str | None = None


def outcomes(folder: Path) -> dict[str, Outcome]:
    """What reading each entry of a folder comes to, by its name."""
    command = [sys.executable, "-m", "tests.hostile_rows", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read = [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
    return {outcome.name: outcome for outcome in read}


def damaged_files(folder: Path, seeds: Iterable[str]) -> None:
    """Write a file a seed, each a sound file of one of the formats with a few bytes changed."""
    sound = sound_files()
    names = sorted(sound)
    for seed in seeds:
        dice = random.Random(seed)
        name = dice.choice(names)
        (folder / f"{seed}-{name}").write_bytes(_damaged(sound[name], dice))


def _damaged(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 8))):
        kind, place = dice.randrange(6), dice.randrange(len(changed))
        if kind == 0:
            changed[place] = dice.randrange(256)
        elif kind == 1:
            value = dice.choice((2**31 - 1, -1, 2**30, 0, -(2**31), dice.randrange(-(2**31), 2**31)))
            changed[place & ~3 : (place & ~3) + 4] = value.to_bytes(4, "little", signed=True)
        elif kind == 2:
            value = dice.choice((2**62, -1, 2**40, -(2**63), 2**31))
            changed[place & ~7 : (place & ~7) + 8] = value.to_bytes(8, "little", signed=True)
        elif kind == 3:
            del changed[max(place, 16) :]
        elif kind == 4:
            changed[place] ^= 1 << dice.randrange(8)
        else:
            changed[place:place] = changed[place : place + dice.randrange(1, 64)] * dice.randrange(1, 50)
    return bytes(changed)


def sound_files() -> dict[str, bytes]:
    """A small file of every format, packed in every way."""
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": f"é{n}"}, {"role": "assistant", "content": "x" * n}],
            "n": n,
            "w": 1.5,
        }
        for n in range(12)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    texts = {
        "a.jsonl": lines,
        "a.json": json.dumps(rows).encode(),
        "framed.json": json.dumps({"data": rows}, indent=1).encode(),
        "a.csv": b"prompt,completion\n" + b'"a\nb","say ""x"""\r\n' * 12,
        "a.tsv": b"prompt\tcompletion\n" + b"a\tb\n" * 12,
    }
    packed = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in texts.items()}
    packed |= {f"{name}.zst": pa.compress(content, codec="zstd", asbytes=True) for name, content in texts.items()}
    return {**texts, **packed, **_tables(rows)}


def _tables(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    table = pa.Table.from_pylist(rows)
    words = pa.array(["a", "b", None] * 4)
    table = table.append_column("dictionary", words.dictionary_encode()).append_column(
        "views", words.cast("string_view")
    )
    table = table.append_column("maps", pa.array([[("k", 1)], []] * 6, pa.map_(pa.string(), pa.int64())))
    table = table.append_column("large", pa.array([["x"], [], None] * 4, pa.large_list(pa.large_string())))
    files = {}
    for compression in (None, "lz4", "zstd"):
        for kind, make in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
            sink = pa.BufferOutputStream()
            with make(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
                writer.write_table(table, max_chunksize=5)
            files[f"{kind}-{compression}.arrow"] = sink.getvalue().to_pybytes()
    for compression in ("none", "snappy", "zstd", "gzip"):
        for dictionary in (True, False):
            written = io.BytesIO()
            pq.write_table(
                table.drop_columns("views"),
                written,
                row_group_size=5,
                compression=compression,
                use_dictionary=dictionary,
            )
            files[f"{compression}-{dictionary}.parquet"] = written.getvalue()
    return files


def _read(path: Path) -> Outcome:
    """Read all rows, and each with the format that is recognised, as `finetune check` does without a tokenizer."""
    from finetune.data.formats import reader, recognise
    from finetune.data.row_errors import RowError
    from finetune.data.sources import open_files
    from finetune.errors import DataError

    outcome = Outcome(path.name)
    try:
        rows = list(open_files(str(path)))
        read = reader(recognise(row.value for row in rows).format)
    except DataError as error:
        return Outcome(path.name, messages=str(error).splitlines())
    except RowError as error:
        read, outcome.messages = None, [str(error.problem(str(path), 0))]
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            if read is not None:
                read(row.value)
            outcome.rows += 1
        except RowError as error:
            outcome.messages = [*outcome.messages, str(error.problem(row.path, row.number))][:_KEPT]
    return outcome


def _in_a_child(path: Path) -> Outcome:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        data = _memory("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (data + MEMORY, data + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(6 * SECONDS)  # a file that is waited for
        try:
            os.write(writing, json.dumps(asdict(_read(path))).encode())
        except BaseException as error:
            os.write(writing, json.dumps({"name": path.name, "died": repr(error)[:500]}).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        written = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(path.name, died=signal.Signals(os.WTERMSIG(status)).name)
    return Outcome(**json.loads(written))


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    import finetune.data.formats
    import finetune.data.sources  # noqa: F401 - warm before the first fork

    for entry in sorted(Path(sys.argv[1]).iterdir()):
        print(json.dumps(asdict(_in_a_child(entry))), flush=True)
