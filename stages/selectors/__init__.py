"""Selection methods, the plug-ins of the group ``selectors``; ``labelled_corpus`` has what they share."""
