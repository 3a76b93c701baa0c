"""`finetune check`: read, validate and tokenise every row of a recipe as the run would, without loading weights.

`gather` makes a `Report` of a recipe; `terminal` and `page` write it.
"""

from finetune.check.gather import gather
from finetune.check.page import write_page
from finetune.check.report import Report
from finetune.check.terminal import Style, lines

__all__ = ["Report", "Style", "gather", "lines", "write_page"]
