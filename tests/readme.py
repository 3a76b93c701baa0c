"""The commands that the README and the documentation pages show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_commands(markdown: str) -> list[str]:
    """Commands of the ```sh blocks: comments off, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (" ".join(shlex.split(line, comments=True)) for line in lines)
    return [part.strip() for command in commands if command for part in command.split("&&")]


SHOWN = [command for page in PAGES for command in shell_commands(page.read_text(encoding="utf-8"))]
COMMANDS = list(dict.fromkeys(SHOWN))
"""Each command once, the README's first: the pages' commands use the results of those."""
