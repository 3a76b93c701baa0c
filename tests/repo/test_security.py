"""Each claim of SECURITY.md is held by a test of that name."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLAIM = re.compile(r"^\| (?!Claim|-)(?P<claim>.+?) \| (?P<tests>.+) \|$", re.MULTILINE)


def test_each_claim_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    claims = {match["claim"]: re.findall(r"`(test_\w+)`", match["tests"]) for match in CLAIM.finditer(text)}
    assert len(claims) == 14
    tests = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        tests |= set(re.findall(r"^def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
    assert all(claims.values())
    assert {name for names in claims.values() for name in names} <= tests
