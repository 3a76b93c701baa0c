"""The reference of preference tuning: the model before the first step, on the same quantised base.

With a fresh adapter that is the base with the adapter off; with an adapter from an earlier run, that adapter, whose
factors are kept as frozen copies. There is never a second base in memory, nor a merged copy.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer


class Reference(torch.nn.Module):
    """Made before the first step. Passed to TRL as its reference model, so that it loads none of its own.

    `fresh`: the adapter is a new one that changes nothing yet, and no rows of new tokens are trained. `as_base`:
    restores the base's values of what is trained besides parameters (correction biases of routers).
    """

    def __init__(
        self, model: PeftModel, fresh: bool, as_base: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        super().__init__()
        self.config = model.config
        self._as_base = as_base
        # In a tuple, so that torch does not register the policy as a part of its reference.
        self._policy = (model,)
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if fresh else []
        trained = [] if fresh else [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._start = [(parameter, parameter.detach().clone()) for parameter in trained]

    def forward(self, *_: Any, **__: Any) -> None:
        """Never called: `active` makes the policy the reference."""
        raise NotImplementedError

    @contextmanager
    def active(self) -> Iterator[PeftModel]:
        """The model in its state before the first step, without dropout, checkpointing or gradient."""
        (model,) = self._policy
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._as_base(), self._adapters_off(), self._start_parameters():
                yield model
        finally:
            model.train(training)

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        """PEFT's own switch, `disable_adapter`, would also change which parameters train."""
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before, strict=True):
                layer._disable_adapters = value

    @contextmanager
    def _start_parameters(self) -> Iterator[None]:
        """Exchanges the parameters' storages: no copy, and the optimizer keeps the same parameters."""
        now = [parameter.data for parameter, _ in self._start]
        for parameter, start in self._start:
            parameter.data = start
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._start, now, strict=True):
                parameter.data = data
