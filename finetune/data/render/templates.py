"""Chat templates by name or path: the shipped ones stand in `templates/`."""

from pathlib import Path

from finetune.errors import DataError, Problem

FOLDER = Path(__file__).parent / "templates"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def read_template(name_or_path: str) -> str:
    """The Jinja source of a shipped template (by name) or of a file; `DataError` if it is neither."""
    path = FOLDER / f"{name_or_path}.jinja" if name_or_path in SHIPPED else Path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                where="data.chat_template",
                what="no such template",
                got=f"{name_or_path!r} ({error.__class__.__name__})",
                do=f"name a shipped template ({', '.join(SHIPPED)}) or the path of a .jinja file",
            )
        ) from error
