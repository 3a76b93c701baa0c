"""`finetune families`: list the supported architectures with their limits, or print one with its chat templates."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser("families", help="list the supported architectures", description=__doc__)
    parser.add_argument("name", nargs="?", help="the model_type of a config.json: print this architecture alone")
    parser.add_argument("--markdown", action="store_true", help="print the chat templates of docs/chat-templates.md")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of architectures, or the lines of one."""
    from finetune.moe.families import families_table, family_lines, family_of

    if args.name is None and not args.markdown:
        print(families_table())
        return 0
    from finetune.data.render.family_lines import template_lines, templates_page  # not for the list: it is slower

    if args.markdown:
        print(templates_page(), end="")
    else:
        family = family_of(args.name, "finetune families")
        print("\n".join([*family_lines(family), "", *template_lines(family.model_type)]))
    return 0
