"""The graph of a decoder for ONNX Runtime, written without tracing."""
