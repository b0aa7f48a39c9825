"""Quality scorers: small classes with `name`, `higher_is_better`, `setup` and `score`; no Curator needed."""
