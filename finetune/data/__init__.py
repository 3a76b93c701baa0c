"""Floor 2: rows of a JSONL file -> conversations -> token ids with the supervised ones marked -> batches."""
