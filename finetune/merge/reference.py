"""What a merge is held against where the base is one in 4 bits: the weights that 4-bit loading makes.

They come from the loader that training uses, through transformers and bitsandbytes; the merge's own reading of the base
takes no part. The arithmetic is fp32 all the same, as it is for the merged model.
"""

from typing import Any

import torch

from finetune.checkpoint import CheckpointReader
from finetune.merge.logits import LayerwiseModel
from finetune.moe.nf4 import Nf4Stack, linear_weight
from finetune.moe.quantizer import MoeNf4Config


class QuantizedModel(LayerwiseModel):
    """A `LayerwiseModel` whose layers are loaded in 4 bits as for training in `dtype`.

    `on_disk` is what the 4-bit loader is given; `shown` the same checkpoint in 16 bits, which is another reader only
    where it is stored in NF4.
    """

    def __init__(self, dtype: torch.dtype, on_disk: CheckpointReader, shown: CheckpointReader, *args: Any) -> None:
        super().__init__(shown, *args)
        self.dtype, self._on_disk = dtype, on_disk
        self._stored = on_disk.config["quantization_config"] if on_disk is not shown else None

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
        tensors, options = self.layer_tensors(index, self._on_disk), {"dtype": self.dtype, "device_map": {"": "cpu"}}
        if self._stored is not None:
            return self.build(index, tensors, self._stored, **options)[0]
        return self.build(index, tensors, quantization_config=MoeNf4Config(compute_dtype=self.dtype), **options)[0]
