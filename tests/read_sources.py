"""In a process of its own: settings of data sets as JSON on stdin -> rows or messages as JSON on stdout."""

import json
import sys
from typing import Any

from finetune.data.row_errors import RowError
from finetune.data.sources import open_source
from finetune.errors import DataError
from finetune.recipe import DataSource


def outcome(settings: dict[str, Any]) -> dict[str, Any]:
    """What opening and reading gives."""
    try:
        source = open_source(DataSource(**settings, format="auto"))
    except DataError as error:
        return {"refused": str(error)}
    rows = [
        str(row.value.problem(row.path, row.number)) if isinstance(row.value, RowError) else row.value for row in source
    ]
    again = sum(row.progress for row in source)
    return {
        "rows": rows,
        "name": source.name,
        "total": source.total,
        "progress": again,
        "unit": source.unit,
        "fingerprint": source.fingerprint(),
    }


if __name__ == "__main__":
    json.dump([outcome(settings) for settings in json.load(sys.stdin)], sys.stdout)
