"""Quantized-linear kernels: packing, dequantizing, multiplying; on CUDA by Triton, and on the CPU.

Shapes use one letter per dimension, here and everywhere in qtune: O out features, I in features,
G group size (weights that share a scale), T tokens, R adapter rank.

Ops (namespace `qtune`): `dequantize`, `linear`, `linear_dx`. Each has its schema, shape
function and plain PyTorch version in the file of its name, and its Triton kernels in
`*_triton.py` beside it.
"""
