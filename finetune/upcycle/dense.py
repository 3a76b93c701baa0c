"""The interface of a dense source, the tensors of a Llama or Mistral model, and its generation config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from finetune.errors import Problem, WeightsError
from finetune.files import write_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class DenseTensor:
    """One tensor as `read` returns it: `dtype` as in safetensors ("BF16"), after the requested conversion."""

    dtype: str
    shape: tuple[int, ...]


class DenseSource(Protocol):
    """A dense Llama or Mistral model on disk, whatever its file format.

    `settings` are the fields of transformers' MixtralConfig that follow from the dense model; `tensors` has Hugging
    Face's names.
    """

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, DenseTensor]

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the dtype and shape stated in `tensors`."""
        ...

    def write_companions(self, folder: Path) -> None:
        """Write tokenizer, chat template and generation config into `folder`."""
        ...


def layer_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer's tensors by the name below `model.layers.N.`."""
    H, I = settings["hidden_size"], settings["intermediate_size"]  # noqa: E741  (usual symbols)
    q = settings["num_attention_heads"] * settings["head_dim"]
    kv = settings["num_key_value_heads"] * settings["head_dim"]
    return {
        "input_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (q, H),
        "self_attn.k_proj.weight": (kv, H),
        "self_attn.v_proj.weight": (kv, H),
        "self_attn.o_proj.weight": (H, q),
        "post_attention_layernorm.weight": (H,),
        "mlp.gate_proj.weight": (I, H),
        "mlp.up_proj.weight": (I, H),
        "mlp.down_proj.weight": (H, I),
    }


def dense_shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of the dense model, in the order of the forward pass."""
    V, H = settings["vocab_size"], settings["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, H)}
    for layer in range(settings["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(settings).items()}
    shapes[FINAL_NORM] = (H,)
    if not settings["tie_word_embeddings"]:
        shapes[HEAD] = (V, H)
    return shapes


def check_tensors(source: DenseSource) -> None:
    """Raise WeightsError unless the source holds exactly the tensors that its settings require.

    An extra tensor (a bias, a second norm, a RoPE table) would be dropped, which would change the model.
    """
    expected = dense_shapes(source.settings)
    where = str(source.path)
    problems = []
    if missing := [name for name in expected if name not in source.tensors]:
        problems.append(_listing(where, "lacks tensors of its architecture", "fetch the whole model", missing))
    if extra := [name for name in source.tensors if name not in expected]:
        do = "use a plain Llama or Mistral model: Mixtral has no place for them"
        problems.append(_listing(where, "has tensors that Mixtral cannot hold", do, extra))
    wrong = [
        f"{name} {list(source.tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    if wrong:
        problems.append(_listing(where, "has tensors whose shape differs from its config", "fetch it again", wrong))
    if problems:
        raise WeightsError(problems)


def _listing(where: str, what: str, do: str, names: list[str]) -> Problem:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return Problem(where, what, do, got=", ".join(names[:4]) + more)


def write_generation_config(folder: Path, settings: dict[str, Any], eos: int | list[int] | None = None) -> None:
    """Write the special tokens that `generate` needs; `eos` replaces the config's if chats end with another token."""
    fields = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if eos is not None:
        fields["eos_token_id"] = eos
    write_json(folder / "generation_config.json", {name: value for name, value in fields.items() if value is not None})
