"""Expert-Specialized Fine-Tuning (arXiv 2407.01906): adapters of the most relevant experts only."""
