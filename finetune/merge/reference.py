"""What a merge is held against where the base is one in 4 bits: the weights that 4-bit loading makes.

They come from the loader that training uses, through transformers and bitsandbytes; the merge's own reading of the base
takes no part. The arithmetic is fp32 all the same, as it is for the merged model.
"""

from typing import Any

import torch

from finetune.checkpoint import CheckpointReader
from finetune.merge.logits import LayerwiseModel
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.moe.nf4_loading import MoeNf4Config


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
        options = {"dtype": self.dtype, "device_map": {"": "cpu"}, "quantization_config": quantization}
        return self.build(index, self.layer_tensors(index), **options)[0]
