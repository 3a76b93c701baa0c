"""Logits of a checkpoint on disk, one decoder layer in memory at a time, through transformers' and PEFT's own code.

Each layer is loaded as a model of one layer by `from_pretrained` (fp32), given the adapter by
`PeftModel.from_pretrained`, and run on the hidden states that the layer before left. So Mixtral 8x7B needs the memory
of one of its layers in fp32, and no line of the merge takes part in what it is compared with.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn

from finetune.checkpoint import CheckpointReader
from finetune.checkpoint.reader import read_header
from finetune.merge.adapter import WEIGHTS_FILE

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


class LayerwiseModel:
    """A causal language model on disk, run layer by layer; `adapter` is a PEFT folder or None.

    `config` is the content of its `config.json`.
    """

    def __init__(self, reader: CheckpointReader, config: dict[str, Any], adapter: Path | None = None) -> None:
        self.reader, self.config, self.adapter = reader, config, adapter
        self.num_layers = int(config["num_hidden_layers"])
        self._adapter_keys = [] if adapter is None else list(read_header(adapter / WEIGHTS_FILE))

    def logits(
        self, prompts: Sequence[torch.Tensor], advance: Callable[[int], object] = lambda _: None
    ) -> dict[str, list[torch.Tensor]]:
        """Logits [T, V] of each prompt [T] in fp32, as "base" and, with an adapter, as "adapted"."""
        names = ("base",) if self.adapter is None else ("base", "adapted")
        states = {name: [prompt[None] for prompt in prompts] for name in names}
        for index in range(self.num_layers):
            with _no_progress_bars():
                model = self._load(index)
            for name in names:
                plain = name == "base" and self.adapter is not None
                disabled = model.disable_adapter if plain and isinstance(model, PeftModel) else nullcontext
                states[name] = self._step(model, index, states[name], disabled)
            advance(1)
        return {name: [logits_1TV[0] for logits_1TV in values] for name, values in states.items()}

    @torch.no_grad()
    def _step(
        self,
        model: Any,
        index: int,
        states: list[torch.Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> list[torch.Tensor]:
        """Hidden states after the layer, or the logits after the last one."""
        layer = self._causal_lm(model).model.layers[:][0]
        kept: list[torch.Tensor] = []
        hook = layer.register_forward_hook(lambda *call: kept.append(call[2]))
        logits = []
        with context():
            for state in states:
                given = {"input_ids": state} if index == 0 else {"inputs_embeds": state}
                logits.append(model(**given, use_cache=False).logits)
        hook.remove()
        return logits if index == self.num_layers - 1 else kept

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

    @staticmethod
    def _causal_lm(model: Any) -> Any:
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _layer_config(self, index: int) -> Any:
        """The model's own configuration with one layer; without vocabulary where neither end needs it."""
        settings = {**self.config, "num_hidden_layers": 1}
        if isinstance(settings.get("layer_types"), list):
            settings["layer_types"] = settings["layer_types"][index : index + 1]
        if not self._needs_vocabulary(index):
            settings |= {"vocab_size": 1, "pad_token_id": None}
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
