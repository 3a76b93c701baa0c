"""Floor 7: one file a command. Parse, call, print; no logic."""
