"""QLoRA fine-tuning for Mixture-of-Experts language models that is right by construction."""

__version__ = "0.1.0"
