"""The command `mixer-classify`: many images through a server, or through a model file."""
