"""`finetune check`: read, validate and tokenise every row of a recipe as the run would, without loading weights.

`gather` makes a `Report` of a recipe; `output` writes it. `finetune template` shows one template: `shown_template`.
"""

from finetune.check.check_report import Report
from finetune.check.output import Style, lines, template_lines, write_page
from finetune.check.shown_template import Choices, ShownTemplate, show_template

# `gather` is imported from its module: it brings the trainers' libraries, which a template does not need.
__all__ = ["Choices", "Report", "ShownTemplate", "Style", "lines", "show_template", "template_lines", "write_page"]
