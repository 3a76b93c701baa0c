"""`finetune check`: read, validate and tokenise every row of a recipe as the run would, without loading weights.

`gather` makes a `Report` of a recipe; `output` writes it.
"""

from finetune.check.check_report import Report
from finetune.check.gather import gather
from finetune.check.output import Style, lines, write_page

__all__ = ["Report", "Style", "gather", "lines", "write_page"]
