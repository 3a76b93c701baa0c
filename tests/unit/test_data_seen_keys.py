"""What came before is known for any number of keys, without holding them."""

import subprocess
import sys

from finetune.data.tokens.cache import Seen


def test_a_key_is_new_once_and_then_names_where_it_came_first() -> None:
    with Seen() as seen:
        assert seen.first("a", "f:1") is None
        assert seen.first("b", "f:2") is None
        assert seen.first("a", "f:3") == "f:1"
        assert seen.first("a", "f:4") == "f:1"


def test_half_a_surrogate_pair_is_a_key_like_any_other() -> None:
    with Seen() as seen:
        assert seen.first("\ud800", "f:1") is None
        assert seen.first("\ud800", "f:2") == "f:1"


def test_memory_does_not_grow_with_the_keys() -> None:
    script = (
        "import resource\n"
        "from finetune.data.tokens.cache import Seen\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with Seen() as seen:\n"
        "    for i in range(50_000): seen.first(str(i), f'file.jsonl:{i}')\n"
        "    early = peak()\n"
        "    for i in range(50_000, 300_000): seen.first(str(i), f'file.jsonl:{i}')\n"
        "    print(peak() - early)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2_000  # KiB; a set of 250,000 hashes would take 20,000
