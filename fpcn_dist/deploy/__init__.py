"""A trained model at work: predictions, with PyTorch or from an ONNX file without it."""
