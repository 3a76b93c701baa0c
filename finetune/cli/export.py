"""`finetune export`: an adapter or a merged model in the form that another program reads."""

import argparse
from pathlib import Path

from finetune.cli.merge import LAYOUTS

FORMATS = ("peft", "vllm", "gguf")
OUTTYPES = ("f32", "f16", "bf16", "q8_0")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "export",
        help="write an adapter for PEFT or vLLM, or a model as GGUF",
        description="peft: the adapter as it was saved, whole. vllm: a LoRA folder with the factors of each expert, "
        "as vLLM's fused-MoE LoRA reads them. gguf: one file for llama.cpp, from a merged folder; an adapter is merged "
        "and proven first.",
    )
    parser.add_argument("path", type=Path, help="adapter folder; for gguf also the folder of a merged model")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, required=True, help="new folder; for gguf a new file")
    parser.add_argument("--base", type=Path, help="where the adapter's base lies now, if not where it was trained from")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="the order of the experts' factors, where the adapter's files do not say"
    )
    parser.add_argument("--outtype", choices=OUTTYPES, help="number format of a GGUF file (default: the model's own)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, say what was written."""
    from finetune.export import export

    done = export(args.path, args.output, args.format, base=args.base, layout=args.layout, outtype=args.outtype)
    print(f"written: {done.output}")
    print("\n".join(done.lines))
    return 0
