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
        description="peft: a complete copy of the adapter. vllm: a LoRA folder with per-expert factors for vLLM's "
        "fused-MoE LoRA. gguf: one file for llama.cpp, from a merged folder; an adapter is merged and verified first.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="adapter folder, run, RUN/checkpoint-N or RUN@best; for gguf also the folder of a merged model",
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, required=True, help="new folder; for gguf a new file")
    parser.add_argument("--base", type=Path, help="base checkpoint folder, if it has moved since training")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="order of the experts' LoRA factors, if the adapter's files do not declare it",
    )
    parser.add_argument(
        "--outtype", choices=OUTTYPES, help="number format of the GGUF file (default: that of the model)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, say what was written."""
    from finetune.export import export

    done = export(args.path, args.output, args.format, base=args.base, layout=args.layout, outtype=args.outtype)
    print(f"written: {done.output}")
    print("\n".join(done.lines))
    return 0
