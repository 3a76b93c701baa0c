"""Floor 3: the heart. 4-bit expert stacks, factored LoRA, router balance, audit."""
