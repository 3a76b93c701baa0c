"""Files appear whole or not at all."""

import json
from pathlib import Path

import pytest

from finetune.files import write_atomically, write_json, write_text


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
