"""Tell names of hub data sets from paths by their form alone; no file is opened, no server is asked."""

import re

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s]*/)?datasets/([\w.-]+/[\w.-]+)")


def is_hub_id(name: str) -> bool:
    """True for `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


def looks_like_hub_id(path: str) -> bool:
    """True for a path that may be meant as `owner/name`: for messages about paths that do not exist."""
    return is_hub_id(path) and not path.lower().endswith(_ENDINGS)


def looks_like_path(name: str) -> bool:
    """True for a name that can only be meant as a path of files."""
    return name.startswith((".", "/", "~")) or name.lower().endswith(_ENDINGS) or any(c in name for c in "\\*?[")


def is_url(name: str) -> bool:
    """True for `scheme://...`."""
    return _URL.match(name) is not None


def hub_id_in_url(url: str) -> str | None:
    """`owner/name` of the address of a hub data set; None for other addresses."""
    match = _HUB_URL.match(url)
    return match[1] if match else None
