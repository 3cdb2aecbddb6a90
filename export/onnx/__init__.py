"""ONNX files: traced from a torch network, folded, checked against a target, and described."""
