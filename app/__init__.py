"""Mixer Serve: classify uploaded images with a trained MLP-Mixer."""
