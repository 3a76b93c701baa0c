"""Files appear whole or not at all; what is no file is not read."""

import json
import os
import socket
from pathlib import Path

import pytest

from finetune.files import (
    NotRegularError,
    check_all_regular,
    check_regular,
    open_regular,
    read_json,
    write_atomically,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    write_json(path, {"größe": [1, 0.1]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"größe": [1, 0.1]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_only_with_its_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")

    write_atomically(path, write)
    assert path.read_bytes() == b"whole"


def test_only_regular_files_are_opened_and_nothing_waits_for_a_writer(tmp_path: Path) -> None:
    fifo, whole = tmp_path / "rows.jsonl", tmp_path / "whole.json"
    os.mkfifo(fifo)
    (tmp_path / "to-memory.json").symlink_to("/proc/self/mem")
    (tmp_path / "to-whole.json").symlink_to(whole)
    whole.write_text('{"a": 1}', encoding="utf-8")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    kinds = {
        fifo: "it is a FIFO or pipe",
        tmp_path / "socket": "it is a socket",
        tmp_path: "it is a folder",
        Path("/dev/zero"): "it is a device",
        tmp_path / "to-memory.json": "the kernel makes up",
        tmp_path / "a\0b": "it has a NUL byte",
    }
    for path, reason in kinds.items():
        for read in (open_regular, check_regular, read_json):
            with pytest.raises(NotRegularError, match=reason) as caught:
                read(path)
            assert caught.value.filename == str(path)
    with pytest.raises(NotRegularError, match=r"FIFO or pipe.*rows\.jsonl"):
        check_all_regular(tmp_path)
    assert read_json(tmp_path / "to-whole.json") == {"a": 1}


def test_json_is_bounded_in_size_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, reason in (('{"a":' + "[" * 200_000, "nested too deeply"), ("1" * 5000, "4300 digits")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=reason):
            read_json(path)
    with pytest.raises(OSError, match="larger than 100 bytes"):
        read_json(path, limit=100)
