"""The tests; each docstring states one fact."""
