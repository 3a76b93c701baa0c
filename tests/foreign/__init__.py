"""Adapters made by other versions of PEFT and transformers, and the script that made them."""
