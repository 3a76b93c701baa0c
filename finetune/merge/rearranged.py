"""Factors of experts in the order in which stock PEFT reads them, from whatever order a file has.

E experts, r rank, x features of the file's `lora_A`, y those of its `lora_B`. Written apart from what the merge
computes with, and compared with it by the proof.
"""

from collections.abc import Iterable, Mapping

import torch

from finetune.adapters.adapter import Adapter
from finetune.adapters.contents import PREFIX
from finetune.adapters.orders import resolved_targets
from finetune.adapters.targets import StackOrder, Target
from finetune.checkpoint import CheckpointReader
from finetune.moe.families import Family


def foreign_stacks(base: CheckpointReader, adapter: Adapter, family: Family) -> list[Target]:
    """The stacks whose factors are not as PEFT 0.21 writes them."""
    stacks = [target for target in resolved_targets(base, adapter, family) if target.experts > 1]
    return [stack for stack in stacks if stack.order != StackOrder() or stack.path != stack.peft_path]


def as_peft(factors: Mapping[str, torch.Tensor], stacks: Iterable[Target]) -> dict[str, torch.Tensor]:
    """The factors by the names that PEFT 0.21 gives them; of those in `stacks` in its order."""
    found = dict(factors)
    held = [stack for stack in stacks if _name(stack.path, "A") in factors]
    pairs = [(found.pop(_name(stack.path, "A")), found.pop(_name(stack.path, "B"))) for stack in held]
    for stack, (A, B) in zip(held, pairs, strict=True):
        A_Erx = A.reshape(stack.experts, -1, A.shape[1])
        if stack.order.expert_major:
            B_Ery = B.reshape(len(B), stack.experts, -1).permute(1, 2, 0)
        else:
            B_Ery = B.reshape(len(B), -1, stack.experts).permute(2, 1, 0)
        if stack.order.swapped:
            A_Erx, B_Ery = B_Ery, A_Erx
        found[_name(stack.peft_path, "A")] = A_Erx.flatten(0, 1).contiguous()
        found[_name(stack.peft_path, "B")] = B_Ery.permute(2, 1, 0).flatten(1).contiguous()
    return found


def _name(path: str, factor: str) -> str:
    return f"{PREFIX}{path}.lora_{factor}.weight"
