"""The Mixtral side: config.json, tensor names, and the weights as one stream from the dense source.

w1 = gate_proj, w3 = up_proj, w2 = down_proj, as in transformers' MixtralExperts. Sparse upcycling: arXiv 2212.05055.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from finetune.checkpoint import CheckpointWriter, TensorSpec
from finetune.checkpoint.reader import TORCH_DTYPES
from finetune.errors import Problem, WeightsError
from finetune.files import write_json
from finetune.moe.families import FAMILIES, MoeLayout
from finetune.upcycle.dense import EMBEDDING, DenseSource, dense_shapes

ROUTER_STD = 0.02  # MixtralConfig.initializer_range, as for Mixtral's own routers
EXPERT_NAMES = {"mlp.gate_proj.weight": "w1", "mlp.up_proj.weight": "w3", "mlp.down_proj.weight": "w2"}


@dataclass(frozen=True)
class Options:
    """The user's options. `noise` is in standard deviations of each matrix; `dtype` None keeps the source's."""

    num_experts: int
    top_k: int
    noise: float = 0.0
    seed: int = 42
    dtype: str | None = None
    max_shard_bytes: int = 2 * 2**30


@dataclass(frozen=True)
class Piece:
    """Tensors made from one dense tensor; `source` None: a router, which has no dense counterpart."""

    source: str | None
    targets: tuple[TensorSpec, ...]
    noisy: bool


def write_config(folder: Path, source: DenseSource, options: Options) -> None:
    """Write `config.json`: MixtralConfig's fields, and a top-level `rope_theta` for readers of the older form."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        **source.settings,
        num_local_experts=options.num_experts,
        num_experts_per_tok=options.top_k,
        output_router_logits=False,
        architectures=["MixtralForCausalLM"],
        dtype=_torch_name(source.tensors[EMBEDDING].dtype),
    )
    fields = config.to_diff_dict()
    # transformers omits fields that equal its defaults; other programs have other defaults.
    fields |= {name: getattr(config, name) for name in (*source.settings, "output_router_logits")}
    fields["rope_theta"] = config.rope_parameters["rope_theta"]
    if config.rope_parameters["rope_type"] != "default":
        fields["rope_scaling"] = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
    write_json(folder / "config.json", fields)


def _torch_name(dtype: str) -> str:
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


def _layout() -> MoeLayout:
    layout = FAMILIES["mixtral"].moe
    assert layout is not None
    return layout


def plan(source: DenseSource, num_experts: int) -> Iterator[Piece]:
    """Every tensor of the Mixtral, grouped by the dense tensor that it comes from, in the order of the forward pass."""
    layout = _layout()
    for name, shape in dense_shapes(source.settings).items():
        dtype = source.tensors[name].dtype
        prefix, below = _split_layer(name)
        if below in EXPERT_NAMES:
            if below == "mlp.gate_proj.weight":
                router = TensorSpec(prefix + layout.disk_router, dtype, (num_experts, shape[1]))
                yield Piece(None, (router,), noisy=True)
            keys = (
                prefix + layout.disk_expert.format(expert=expert, name=EXPERT_NAMES[below])
                for expert in range(num_experts)
            )
            yield Piece(name, tuple(TensorSpec(key, dtype, shape) for key in keys), noisy=True)
        else:
            yield Piece(name, (TensorSpec(name, dtype, shape),), noisy=False)


def _split_layer(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.3.`, `mlp.up_proj.weight`); ("", name) elsewhere."""
    if not name.startswith("model.layers."):
        return "", name
    number, _, below = name.removeprefix("model.layers.").partition(".")
    return f"model.layers.{number}.", below


def write_weights(folder: Path, source: DenseSource, options: Options) -> int:
    """Stream the weights into `folder`, one dense tensor in memory at a time; returns the number of parameters."""
    pieces = list(plan(source, options.num_experts))
    specs = [spec for piece in pieces for spec in piece.targets]
    parameters = 0
    with (
        CheckpointWriter(folder, specs, max_shard_bytes=options.max_shard_bytes) as writer,
        tqdm(total=sum(spec.nbytes for spec in specs), unit="B", unit_scale=True, desc="upcycle") as progress,
    ):
        for piece in pieces:
            dense = None if piece.source is None else source.read(piece.source)
            for spec in piece.targets:
                tensor = _router(spec, options.seed) if dense is None else dense
                if piece.noisy and options.noise:
                    tensor = perturb(tensor, options.noise, options.seed, spec.key)
                if not bool(torch.isfinite(tensor).all()):
                    do = "choose --dtype bfloat16 or float32, or fetch the source again"
                    raise WeightsError(Problem(f"{source.path}: {spec.key}", "holds a value that is not finite", do))
                writer.write(spec.key, tensor)
                parameters += tensor.numel()
                progress.update(spec.nbytes)
    return parameters


def perturb(weight: torch.Tensor, noise: float, seed: int, key: str) -> torch.Tensor:
    """`weight` plus Gaussian noise of `noise` times its own standard deviation, in its own dtype."""
    scale = noise * float(weight.float().std())
    return _normal(tuple(weight.shape), seed, f"noise {key}").mul_(scale).add_(weight).to(weight.dtype)


def _router(spec: TensorSpec, seed: int) -> torch.Tensor:
    """A router `[num_experts, hidden_size]`. Never zero: that would send every token to the first `top_k` experts."""
    router_EH = _normal(spec.shape, seed, f"router {spec.key}").mul_(ROUTER_STD)
    return router_EH.to(TORCH_DTYPES[spec.dtype])


def _normal(shape: tuple[int, ...], seed: int, stream: str) -> torch.Tensor:
    """Standard normal fp32 numbers from a separate stream, so that no tensor's values depend on another tensor."""
    digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
