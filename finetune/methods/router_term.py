"""The routers as every method uses them: captured in the forward, terms added to the loss, figures when logged."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from finetune.errors import Problem, RunError
from finetune.moe.balance import AllReduce, StepBalance, StepFigures, load_figures, token_sums
from finetune.moe.families import Family
from finetune.moe.router import RouterRecord, capture, find_routers
from finetune.moe.router_bias import BiasBalance
from finetune.recipe import RouterSettings

STATE_FILE = "router_balance.json"


class RouterTerm:
    """One model's routers over the optimizer steps, as the recipe's `router` section says.

    Only `figures`, for logging, and what a run needs at its end or in a checkpoint wait for the device.
    """

    def __init__(self, model: Any, family: Family, settings: RouterSettings) -> None:
        assert family.moe is not None
        self.settings, self.scores = settings, family.moe.scores
        self.routers = find_routers(model, family.moe.router_module)
        device = self.routers[0].device
        self.balance = StepBalance(
            [router.top_k for router in self.routers],
            self.routers[0].num_experts,
            device,
            settings.balance,
            settings.scope,
        )
        rate = settings.bias_update_rate
        self.bias = BiasBalance(model, family, rate) if rate else None
        self._last: StepFigures | None = None
        self._window = torch.zeros(2, device=device)  # balance value and z, summed over the steps since the last line
        self._window_steps = 0
        self._finite: list[torch.Tensor] = []  # [L] for each micro-batch of the running step
        self._logged = self._compared = False

    @property
    def minimised(self) -> bool:
        """Whether a term has a weight in the loss."""
        return bool(self.settings.router_aux_loss_coef or self.settings.router_z_loss_coef)

    def begin_step(self, step_tokens: torch.Tensor, logged: bool) -> None:
        """`step_tokens`: real tokens of the whole step, over all ranks; `logged`: whether its figures will be read."""
        self.balance.begin_step(step_tokens)
        self._finite.clear()
        self._logged, self._compared = logged, False

    @property
    def changes(self) -> bool:
        """Whether training changes the routers themselves: by an adapter or by their correction bias."""
        return self.bias is not None or any(router.adapted for router in self.routers)

    def capture(self) -> AbstractContextManager[RouterRecord]:
        """Record the routers of the forward that runs in the block."""
        # Against a router that draws its choice the comparison would count its draws.
        self._compared = self._logged and self.changes and not any(router.draws for router in self.routers)
        if not self._compared:
            return capture(self.routers)
        return capture(self.routers, as_base=nullcontext if self.bias is None else self.bias.as_base)

    def add(self, loss: torch.Tensor, record: RouterRecord, real_T: torch.Tensor, ranks: int) -> torch.Tensor:
        """`loss` plus this micro-batch's share of the weighted terms; `ranks` undoes the averaging of gradients.

        With no weight the loss is returned as it is, bit for bit.
        """
        with torch.set_grad_enabled(self.minimised):
            sums = token_sums(record, real_T, self.scores)
            balance, z = self.balance.terms(sums, real_T.sum())
        self._finite.append(sums.finite_L)
        if not self.minimised:
            return loss
        weighted = self.settings.router_aux_loss_coef * balance + self.settings.router_z_loss_coef * z
        return loss + ranks * weighted

    def dead_share(self, all_reduce: AllReduce) -> torch.Tensor:
        """Share of the experts that got no token of the step's micro-batches and ranks. Scalar, on the device."""
        return self.balance.dead_share(all_reduce)

    def end_step(self, all_reduce: AllReduce, skipped: bool = False) -> None:
        """Close the optimizer step over all ranks, and move the correction biases.

        `skipped`: the weights did not move; biases, frequencies and means stay as they are.
        """
        self._last = self.balance.end_step(all_reduce, skipped)
        if skipped:
            return
        self._window += torch.stack([self._last.value, self._last.z])
        self._window_steps += 1
        if self.bias is not None:
            self.bias.end_step(self._last.count_LE)

    def figures(self) -> tuple[dict[str, float], dict[str, Any]]:
        """What is logged: scalars, and the load by layer and expert (JSON). Reads from the device, once.

        `balance_loss` and `router/z_loss` are means over the optimizer steps since the last call, unweighted; the
        others are of the last step: means over layers, but `router/dead_experts` is a sum.
        """
        if self._last is None:
            return {}, {}
        figures = load_figures(self._last.count_LE)
        columns = torch.stack([*figures.values(), self._last.changed_L], -1)
        window = (self._window / max(self._window_steps, 1)).expand(len(self.routers), 2)
        rows = torch.cat([window, columns, self._last.count_LE], -1).tolist()
        self._window.zero_()
        self._window_steps = 0
        by_layer = {name: [row[2 + index] for row in rows] for index, name in enumerate((*figures, "changed"))}
        if not self._compared:
            del by_layer["changed"]
        scalars = {"balance_loss": rows[0][0], "router/z_loss": rows[0][1]}
        for name, values in by_layer.items():
            scalars[f"router/{name}"] = sum(values) / (1 if name == "dead_experts" else len(values))
        tokens = [[round(count) for count in row[2 + columns.shape[-1] :]] for row in rows]
        return scalars, {"layers": [router.layer for router in self.routers], "tokens": tokens, **by_layer}

    def first_not_finite(self) -> str | None:
        """The router whose logits were the first in the running step that are not all finite; None if all are.

        Waits for the device: for the message of a run that stops.
        """
        for finite_L in self._finite:
            for router, finite in zip(self.routers, finite_L.tolist(), strict=True):
                if not finite:
                    return router.name
        return None

    def window(self) -> dict[str, Any]:
        """The sums since the last logged line, for a checkpoint."""
        return {"router_window": self._window.tolist(), "router_steps": self._window_steps}

    def load_window(self, state: Mapping[str, Any]) -> None:
        """Continue from `window()`."""
        self._window += torch.tensor(state["router_window"], dtype=self._window.dtype, device=self._window.device)
        self._window_steps = state["router_steps"]

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs, as plain numbers."""
        bias = {} if self.bias is None else {"bias": self.bias.state_dict()}
        return {**self.balance.state_dict(), **bias}

    def load(self, folder: Path) -> None:
        """Continue from `state_dict()`, read from a checkpoint; raises RunError where the checkpoint lacks it."""
        path = folder / STATE_FILE
        if not path.is_file():
            raise RunError(Problem(str(path), "the checkpoint has no router state", "start anew in another output_dir"))
        state = json.loads(path.read_text(encoding="utf-8"))
        self.balance.load_state_dict(state)
        if self.bias is not None:
            self.bias.load_state_dict(state["bias"], str(path))
