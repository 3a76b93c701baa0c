"""Whether a chat template reads the variables that a recipe gives it."""

from difflib import get_close_matches

from finetune.data.render.compiled_template import CompiledTemplate
from finetune.errors import Problem, RecipeError


def check_template_args(chat: CompiledTemplate) -> None:
    """Raise RecipeError for `data.template_args` that would change nothing: the template reads no such variable."""
    problems = []
    for name, value in chat.args.items():
        if name not in chat.variables:
            near = get_close_matches(name, chat.variables, n=1)
            known = ", ".join(chat.variables)
            do = f"did you mean {near[0]}?" if near else f"remove it, or write one of {known}" if known else "remove it"
            what = f"{chat.name} reads no such variable"
            problems.append(Problem(f"data.template_args.{name}", what, do, got=str(value)))
    if problems:
        raise RecipeError(problems)
