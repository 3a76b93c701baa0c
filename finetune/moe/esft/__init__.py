"""Expert-Specialized Fine-Tuning (arXiv 2407.01906): adapters of the experts that matter, and of no others."""
