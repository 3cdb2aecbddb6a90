"""Turn a pruned network into ONNX for a named target, and prove that it still computes the same."""
