"""Logits of a checkpoint on disk with one decoder layer in memory at a time, through transformers' and PEFT's code.

`from_pretrained` builds the whole model in fp32 with all decoder layers but one emptied; an emptied layer returns its
input. The model's own forward makes masks and positions for the one layer, whichever kind it is, and the layer receives
the hidden states of the layer before. A Mixtral 8x7B so needs the memory of one layer in fp32, no architecture needs
code of its own, and no code of the merge is used in what the merge is compared with.

For a base in 4 bits the weights come from the loader that training uses (transformers and bitsandbytes). The arithmetic
is fp32 all the same, as it is for the merged model.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from finetune.adapters.adapter import WEIGHTS_FILE
from finetune.adapters.lineage import Weighted
from finetune.adapters.tensors import EMBEDDING, HEAD, ROWS
from finetune.adapters.whole_tensors import TokenRows, bias_tensors, moved_biases
from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import read_header
from finetune.errors import Problem, WeightsError
from finetune.merge.routing_replay import Routing
from finetune.merge.stock_peft import foreign_stacks, with_adapter
from finetune.model_files import build_config, reading
from finetune.moe.families import family_of
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.moe.nf4_loading import MoeNf4Config


class LayerwiseModel:
    """A causal language model on disk, run layer by layer; with adapters, each of them applied by stock PEFT.

    `config` is the content of its `config.json`. With adapters `routing` is recorded, without any it is replayed.
    `token_rows`: of added tokens, which a base has not; it is shown with the adapter's, so that what is told apart is
    the factors' effect.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: dict[str, Any],
        adapters: Sequence[Weighted] = (),
        routing: Routing | None = None,
        token_rows: Mapping[str, TokenRows] | None = None,
    ) -> None:
        self.reader, self.adapters, self.routing = reader, tuple(adapters), routing
        self._token_rows = token_rows or {}
        self.settings = {**config, "output_router_logits": False}
        self.num_layers = int(build_config(self.settings, reader.folder).num_hidden_layers)
        self._family = family_of(str(config["model_type"]), f"{reader.folder}: model_type")
        self._foreign = [foreign_stacks(reader, weighted.adapter, self._family) for weighted in adapters]
        self._biases = {
            name: bias for weighted in adapters for name, bias in bias_tensors(weighted.adapter.folder).items()
        }

    def logits(
        self, prompts: Sequence[torch.Tensor], advance: Callable[[int], object] = lambda _: None
    ) -> dict[str, torch.Tensor]:
        """Logits of all prompts [T], one after the other, in fp32 [sum T, V].

        "plain" are those of the weights on disk; "adapted" those with the adapter; "rerouted" those of the weights on
        disk under the recorded routing. Raises WeightsError for weights that the architecture needs and are not there.

        The prompts are one batch, padded on the right: PEFT forms the adapted stacks once a forward. No mask is
        needed, because no token sees what comes after it; logits and routing of the padding are left out.
        """
        names = ["plain"]
        if self.adapters:
            names.append("adapted")
        elif self.routing is not None:
            names.append("rerouted")
        ids = pad_sequence(list(prompts), batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(prompt) for prompt in prompts])[:, None]
        states = {name: [ids] for name in names}
        for index in range(self.num_layers):
            with _quiet():
                model = self.load(index)
            for name in names:
                if name == "adapted":
                    with _quiet():
                        model = self._adapted(model, index)
                states[name] = self._step(model, index, name, states[name], real)
            advance(1)
        return {name: values[0][real] for name, values in states.items()}

    def hidden(
        self, batches: Sequence[torch.Tensor], advance: Callable[[int], object] = lambda _: None
    ) -> list[torch.Tensor]:
        """What the last layer leaves of each batch [B, T], with the adapters if there are any: [B, T, H]."""
        name, states = "adapted" if self.adapters else "plain", list(batches)
        for index in range(self.num_layers):
            with _quiet():
                model = self.load(index)
                model = self._adapted(model, index) if self.adapters else model
            states = self._step(model, index, name, states)
            advance(1)
        return states

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from what the last layer leaves of a row [1, T, H] to its logits [T, V]."""
        with _quiet():
            model = self.load(self.num_layers)
            model = self._adapted(model, self.num_layers) if self.adapters else model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        last = base.get_decoder().layers[-1]

        @torch.no_grad()
        def logits(state: torch.Tensor) -> torch.Tensor:
            with _passing(last, state):
                found: torch.Tensor = base(inputs_embeds=state, use_cache=False).logits[0]
            return found

        return logits

    @torch.no_grad()
    def _step(
        self, model: Any, index: int, name: str, states: list[torch.Tensor], real: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Hidden states [B, T, H] after the layer; after the last one the logits [B, T, V], if `real` is given.

        `real` [B, T] is False for padding.
        """
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        layer = base.get_decoder().layers[index]
        results = []
        with self._as(name, model):
            for state in states:
                with self._routed(layer, index, name, real), _passing(layer, state if index else None) as left:
                    if index == self.num_layers - 1 and real is not None:
                        results.append(base(**_given(state, index), use_cache=False).logits)
                    else:
                        base.get_decoder()(**_given(state, index), use_cache=False)
                        results += left
        return results

    @contextmanager
    def _as(self, name: str, model: Any) -> Iterator[None]:
        """The model with the correction biases that training moved, or with those on disk."""
        with nullcontext() if name == "plain" else moved_biases(model, self._biases, self._family):
            yield

    def _routed(
        self, layer: nn.Module, index: int, name: str, real: torch.Tensor | None
    ) -> AbstractContextManager[None]:
        if self.routing is None or real is None or name == "plain":
            return nullcontext()
        if name == "adapted":
            return self.routing.record(index, layer)
        return self.routing.replay(index, layer, real)

    def load(self, index: int) -> Any:
        """The model with one layer in fp32."""
        tensors = self.layer_tensors(index)
        expert_dtypes = {tensor.dtype for key, tensor in tensors.items() if ".experts." in key}
        stack_dtype = expert_dtypes.pop() if len(expert_dtypes) == 1 else None
        model, info = self.build(index, tensors, stack_dtype, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # the stacks, which are joined in the file's type
        if info["missing_keys"]:
            got = ", ".join(sorted(info["missing_keys"])[:3])
            raise WeightsError(Problem(str(self.reader.folder), "lacks weights", "give a complete checkpoint", got))
        return model.eval()

    def build(
        self, index: int, tensors: dict[str, torch.Tensor], stack_dtype: torch.dtype | None = None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The model that transformers loads from `tensors`, all layers but one emptied, and its loading info."""
        settings = self.settings
        if not self._needs_vocabulary(index):
            settings = {**settings, "vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        config = build_config(settings, self.reader.folder)
        model_class = _one_layer(self._model_class(config), index, stack_dtype)
        options = {"config": config, "state_dict": tensors, "output_loading_info": True, **options}
        with reading(self.reader.folder, "transformers cannot load it", "give a complete checkpoint"):
            loaded: tuple[Any, dict[str, Any]] = model_class.from_pretrained(None, **options)
        return loaded

    def _model_class(self, config: Any) -> Any:
        named = self._family.transformers_class()
        automatic = named is transformers.AutoModelForCausalLM
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if automatic else named

    def _adapted(self, model: Any, index: int) -> Any:
        """The model under its adapters: each merged in by PEFT itself, but for the last, which PEFT runs beside it."""
        held = []
        for weighted, foreign in zip(self.adapters, self._foreign, strict=True):
            header = read_header(weighted.adapter.folder / WEIGHTS_FILE)
            if factors := {key: info for key, info in header.items() if self._belongs(key, index)}:
                held.append((weighted, factors, foreign))
        for number, (weighted, factors, foreign) in enumerate(held):
            model = with_adapter(model, weighted, factors, index, foreign, self._family)
            if number < len(held) - 1:
                model = model.merge_and_unload() if isinstance(model, PeftModel) else model
        return model.eval()

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of one layer and those outside all layers."""
        reader, tensors = self.reader, {}
        for key in reader.keys:
            if key in (EMBEDDING, HEAD) and not self._needs_vocabulary(index):
                tensors[key] = torch.zeros(1, reader.info(key).shape[1])
            elif key.startswith(f"model.layers.{index}.") or not key.startswith("model.layers."):
                tensor = reader.read(key)
                tensors[key] = self._token_rows[key].onto(tensor) if key in self._token_rows else tensor
        return tensors

    def _needs_vocabulary(self, index: int) -> bool:
        return index in (0, self.num_layers - 1, self.num_layers)

    def _belongs(self, key: str, index: int) -> bool:
        """Whether an adapter's tensor is of layer `index`, or of what comes before the first or after the last one."""
        if index == self.num_layers:  # the head alone, whose rows of added tokens stand in the base
            return ".layers." not in key and not key.endswith(ROWS)
        if key.endswith(ROWS):
            return self._needs_vocabulary(index)
        if f".{EMBEDDING.removesuffix('weight')}" in key:
            return index == 0
        return f".layers.{index}." in key or (index == self.num_layers - 1 and ".layers." not in key)


def _one_layer(model_class: Any, index: int, stack_dtype: torch.dtype | None) -> Any:
    """`model_class` with all decoder layers but number `index` emptied as soon as they are built (without memory).

    The expert stacks of that layer get the type `stack_dtype`, in which transformers' loader then joins their parts:
    two copies of half the size.
    """

    def build(self: Any, config: Any) -> None:
        model_class.__init__(self, config)
        for number, layer in enumerate(self.get_decoder().layers):
            if number != index:
                layer._modules.clear()
                layer._parameters.clear()
                layer._buffers.clear()
                layer.forward = _pass_on
            elif stack_dtype is not None:
                for name, parameter in layer.named_parameters():
                    if ".experts." in name and parameter.dim() == 3:
                        parameter.data = parameter.data.to(stack_dtype)

    # transformers finds an architecture's conversions by its name, for classes of its own.
    return type(model_class.__name__, (model_class,), {"__init__": build, "__module__": model_class.__module__})


def _pass_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _given(state: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
    return {"inputs_embeds": state} if index else {"input_ids": state}


@contextmanager
def _passing(layer: nn.Module, state: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """Within it `layer` gets `state` as its hidden states (None: what comes), and what it returns is kept."""
    left: list[torch.Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (args if state is None else (state, *args[1:])), kwargs

    handles = (
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(lambda *call: left.append(call[2])),
    )
    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bar for each of the loads (the caller shows one for all), and PEFT's false alarms."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT looks for rank patterns among modules only, and applies them to parameters all the same.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern", category=RuntimeWarning)
            # A layer without experts, or without attention, under an adapter that names both.
            warnings.filterwarnings("ignore", message="target_(modules|parameters)=", category=RuntimeWarning)
            # Settings of other versions and tools: `read_adapter` has judged each of them.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)
            # What it says of tied matrices is why a base with an adapter on one of them gets two (`adapters.replaced`).
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
            # PEFT asks transformers for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class QuantizedModel(LayerwiseModel):
    """A `LayerwiseModel` whose layers are loaded in 4 bits as for training in `dtype`."""

    def __init__(self, dtype: torch.dtype, reader: CheckpointReader, *args: Any) -> None:
        super().__init__(reader, *args)
        self.dtype = dtype

    def load(self, index: int) -> Any:
        """The layer in fp32, its linear layers and stacks with what their NF4 stands for, in the training's type."""
        model = super().load(index)
        if index == self.num_layers:  # the head alone, which stays in 16 bits
            return model
        dense = dict(model.named_parameters())
        for name, parameter in self._in_4_bits(index).named_parameters():
            if isinstance(parameter.data, Nf4Stack):
                dense[name].data.copy_(parameter.data.dequantize())
            elif hasattr(parameter, "quant_state"):
                dense[name].data.copy_(linear_weight(parameter))
        return model

    def _in_4_bits(self, index: int) -> Any:
        quantization = MoeNf4Config(compute_dtype=self.dtype)
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "device_map": {"": "cpu"},
            "quantization_config": quantization,
        }
        return self.build(index, self.layer_tensors(index), **options)[0]
