"""Heuristic scorers for quadmix-plugin; each is found through its entry point in pyproject.toml."""
