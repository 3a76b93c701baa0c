"""Floor 5: TRL's trainers plus the router term, nothing more."""
