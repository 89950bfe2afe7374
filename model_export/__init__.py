"""Turn a trained Mixer into one self-describing ONNX file."""
