"""Side-by-side measurements: one command each, results as JSON with commit, hardware and versions."""
