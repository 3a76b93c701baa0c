"""`finetune upcycle SOURCE OUT`: turn a dense Llama or Mistral model into a Mixture-of-Experts (Mixtral) model."""

import argparse
import re
from pathlib import Path

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "upcycle",
        help="turn a dense Llama or Mistral model into a Mixtral with equal experts",
        description="Copy the MLP of a dense Llama or Mistral model into N experts (sparse upcycling, "
        "arXiv 2212.05055). Without noise the result's logits equal the dense model's. Only a few tensors are "
        "in memory at a time.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="Hugging Face folder, or .gguf file")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the Mixtral checkpoint")
    parser.add_argument(
        "--num-experts", type=int, required=True, metavar="N", help="number of experts per layer, 2 or more"
    )
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="number of experts per token, 1 to N")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="add Gaussian noise of X times each matrix's own standard deviation to every expert matrix and router, "
        "independently, so that experts differ; the logits then differ from the dense model's (default: 0)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed for routers and noise (default: 42)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the result (default: the source's; for GGUF bfloat16)"
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default=2 * 2**30,
        metavar="SIZE",
        help="maximum size of a weight file: bytes, or with a unit, such as 500MB or 2GiB (default: 2GiB)",
    )
    parser.set_defaults(run=run)


def size(text: str) -> int:
    """`500MB` -> 500000000, `2GiB` -> 2147483648; plain digits are bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; give bytes or a number with KB, MB, GB, KiB, MiB, GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def run(args: argparse.Namespace) -> int:
    """Upcycle and print what was written."""
    from finetune.upcycle import Options, upcycle

    options = Options(
        num_experts=args.num_experts,
        top_k=args.top_k,
        noise=args.noise,
        seed=args.seed,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        max_shard_bytes=args.max_shard_size,
    )
    report = upcycle(args.source, args.out, options)
    print(
        f"{report.folder}: Mixtral with {options.num_experts} experts, top-{options.top_k}, "
        f"{report.parameters / 1e6:,.1f} M parameters, {report.bytes_written / 1e6:,.1f} MB, {report.seconds:.1f} s"
    )
    return 0
