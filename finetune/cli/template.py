"""`finetune template MODEL [--row FILE:LINE]`: a conversation in a model's chat template, what is supervised marked."""

import argparse
import os
import sys
from typing import get_args

from finetune.cli.arguments import variable
from finetune.recipe.row_formats import ROW_FORMATS
from finetune.recipe.settings import LossOn


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "template",
        help="show a conversation in a model's chat template, and what of it is supervised",
        description="Print a conversation as a model's chat template renders it, with the tokens that are supervised "
        "marked. Only the tokenizer is loaded.",
    )
    parser.add_argument("model", type=os.path.expanduser, help="folder with a tokenizer, or name on the hub")
    parser.add_argument(
        "--row",
        type=os.path.expanduser,
        metavar="FILE:LINE",
        help="the row of a data file that begins at this line (default: built-in conversations)",
    )
    parser.add_argument(
        "--format", default="auto", choices=("auto", *ROW_FORMATS), help="row format of FILE (default: auto)"
    )
    parser.add_argument(
        "--as", dest="chat_template", metavar="NAME", help="data.chat_template: a shipped template or a .jinja file"
    )
    _add_settings(parser)
    parser.set_defaults(run=run)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The recipe's settings on which the text depends."""
    parser.add_argument("--loss-on", default="assistant", choices=get_args(LossOn), help="data.loss_on")
    parser.add_argument(
        "--set",
        dest="template_args",
        type=variable,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="data.template_args: variables of the template, such as enable_thinking=false",
    )
    parser.add_argument(
        "--system",
        default="error",
        choices=("error", "merge_into_first_user"),
        help="data.system: how to treat a system message that the template rejects",
    )
    parser.add_argument("--added-tokens", nargs="+", default=[], metavar="TOKEN", help="model.added_tokens")
    parser.add_argument("--eos-token", metavar="TOKEN", help="model.eos_token")


def run(args: argparse.Namespace) -> int:
    """Print the template."""
    from finetune.check import Choices, Style, show_template, template_lines

    choices = Choices(
        args.model,
        args.chat_template,
        args.loss_on,
        args.system,
        dict(args.template_args),
        tuple(args.added_tokens),
        args.eos_token,
    )
    template = show_template(choices, args.row, args.format)
    for line in template_lines(template, f"{args.model}: {choices.template_name}", Style.of(sys.stdout, os.environ)):
        print(line)
    return 0
