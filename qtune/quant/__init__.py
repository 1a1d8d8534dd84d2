"""Quantized weights: formats, the packed matrix, the linear layer."""
