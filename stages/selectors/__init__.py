"""Selection methods: from a score table and a token budget to a number of copies per document."""
