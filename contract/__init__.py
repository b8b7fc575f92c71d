"""The contract between producers and workers as documents, for every language."""
