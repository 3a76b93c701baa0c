"""Logits of a checkpoint on disk, one decoder layer in memory at a time, through transformers' and PEFT's own code.

Each layer is loaded as a model of one layer by `from_pretrained` (fp32), given the adapter by
`PeftModel.from_pretrained`, and run on the hidden states that the layer before left. So Mixtral 8x7B needs the memory
of one of its layers in fp32, and no line of the merge takes part in what it is compared with.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import read_header
from finetune.merge.adapter import WEIGHTS_FILE
from finetune.moe.checkpointing import kept_routing
from finetune.moe.router import capture, find_routers

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' own bar for each of the loads; the caller shows one for all."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class _LayerInPlace(nn.Module):
    """A list of layers that holds only number `index`, under its own number, so that PEFT sees the real names."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.add_module(str(index), layer)

    def __getitem__(self, taken: slice) -> list[nn.Module]:
        return list(self.children())[taken]

    def __len__(self) -> int:
        return 1


@dataclass
class Routing:
    """Which experts a model with an adapter chose, for a merged model to choose again.

    Two router scores may be so close that rounding a weight to 16 bits chooses another expert; what follows differs
    then, though every weight is right. So logits are also compared under equal choices, and other choices are counted.
    """

    router_module: str
    kept: dict[tuple[int, int], AbstractContextManager[Any]] = field(default_factory=dict)  # by layer and prompt
    decisions: int = 0
    differing: int = 0

    @contextmanager
    def record(self, layer: int, prompt: int) -> Iterator[None]:
        """Keep the choices of the block."""
        keep, self.kept[layer, prompt] = kept_routing()
        with keep:
            yield

    @contextmanager
    def replay(self, layer: int, prompt: int, model: nn.Module) -> Iterator[None]:
        """Choose again what was kept, and count where `model` by itself would have chosen otherwise."""
        with capture(find_routers(model, self.router_module)) as record, self.kept[layer, prompt]:
            yield
        for logits_TE, index_TK in zip(record.logits, record.indices, strict=True):
            own_TE = torch.zeros_like(logits_TE).scatter_(-1, logits_TE.topk(index_TK.shape[-1]).indices, 1.0)
            self.decisions += index_TK.numel()
            self.differing += index_TK.numel() - int(own_TE.gather(-1, index_TK).sum())


class LayerwiseModel:
    """A causal language model on disk, run layer by layer; `adapter` is a PEFT folder or None.

    `config` is the content of its `config.json`. With an adapter `routing` is recorded, without one it is replayed.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: dict[str, Any],
        adapter: Path | None = None,
        routing: Routing | None = None,
    ) -> None:
        self.reader, self.config, self.adapter, self.routing = reader, config, adapter, routing
        self.num_layers = int(config["num_hidden_layers"])
        self._adapter_keys = [] if adapter is None else list(read_header(adapter / WEIGHTS_FILE))

    def logits(
        self, prompts: Sequence[torch.Tensor], advance: Callable[[int], object] = lambda _: None
    ) -> dict[str, torch.Tensor]:
        """Logits of all prompts [T], one after the other, in fp32 [sum T, V].

        "plain" are those of the weights on disk; "adapted" those with the adapter; "rerouted" those of the weights on
        disk under the recorded routing.
        """
        names = ["plain"]
        if self.adapter is not None:
            names.append("adapted")
        elif self.routing is not None:
            names.append("rerouted")
        states = {name: [prompt[None] for prompt in prompts] for name in names}
        for index in range(self.num_layers):
            with _no_progress_bars():
                model = self._load(index)
            states = {name: self._step(model, index, name, states[name]) for name in names}
            advance(1)
        return {name: torch.cat(values, dim=1)[0] for name, values in states.items()}

    @torch.no_grad()
    def _step(self, model: Any, index: int, name: str, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Hidden states [1, T, H] after the layer, or the logits [1, T, V] after the last one."""
        layer = (model.get_base_model() if isinstance(model, PeftModel) else model).model.layers[:][0]
        kept: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda *call: kept.append(call[2]))
        logits = []
        for prompt, state in enumerate(states):
            given = {"input_ids": state} if index == 0 else {"inputs_embeds": state}
            with self._context(model, index, name, prompt):
                logits.append(model(**given, use_cache=False).logits)
        hook.remove()
        return logits if index == self.num_layers - 1 else kept

    def _context(self, model: Any, index: int, name: str, prompt: int) -> AbstractContextManager[Any]:
        if name == "plain":
            context: AbstractContextManager[Any] = (
                model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
            )
            return context
        if self.routing is None:
            return nullcontext()
        if name == "adapted":
            return self.routing.record(index, prompt)
        return self.routing.replay(index, prompt, model)

    def _load(self, index: int) -> Any:
        config = self._layer_config(index)
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        tensors = self._layer_tensors(index, config)
        model = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
        model.model.layers = _LayerInPlace(model.model.layers[0], index)
        if self.adapter is None or not self._is_adapted(index):
            return model
        with warnings.catch_warnings():
            # PEFT looks for rank patterns among modules only, and applies them to parameters all the same.
            warnings.filterwarnings(
                "ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning
            )
            # PEFT asks transformers for a property by its old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            return PeftModel.from_pretrained(model, str(self.adapter)).eval()

    def _layer_config(self, index: int) -> Any:
        """The model's own configuration with one layer; without vocabulary where neither end needs it."""
        settings = {**self.config, "num_hidden_layers": 1}
        if isinstance(settings.get("layer_types"), list):
            settings["layer_types"] = settings["layer_types"][index : index + 1]
        if not self._needs_vocabulary(index):
            settings |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        return transformers.AutoConfig.for_model(**settings)

    def _layer_tensors(self, index: int, config: Any) -> dict[str, torch.Tensor]:
        layer = f"model.layers.{index}."
        tensors = {}
        for key in self.reader.keys:
            if key in (EMBEDDING, HEAD) and not self._needs_vocabulary(index):
                tensors[key] = torch.zeros(1, config.hidden_size)
            elif key.startswith(layer):
                tensors["model.layers.0." + key.removeprefix(layer)] = self.reader.read(key)
            elif not key.startswith("model.layers."):
                tensors[key] = self.reader.read(key)
        return tensors

    def _needs_vocabulary(self, index: int) -> bool:
        return index in (0, self.num_layers - 1) or any(".layers." not in key for key in self._adapter_keys)

    def _is_adapted(self, index: int) -> bool:
        last = index == self.num_layers - 1
        return any(f".layers.{index}." in key or (last and ".layers." not in key) for key in self._adapter_keys)
