"""Domain classifiers: small classes with `name`, `setup` and `classify`; no Curator needed."""
