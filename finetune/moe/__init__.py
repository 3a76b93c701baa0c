"""The core: 4-bit expert stacks, factored LoRA, routers and their balance, the audit."""
