"""Quantized-linear kernels: packing, dequantizing and multiplying, on CUDA by Triton and on the CPU.

Shapes use one letter per dimension, here and everywhere in qtune: O out features, I in features,
G group size (weights that share a scale), T tokens, R adapter rank.

Ops (namespace `qtune`): `dequantize`, `linear`, `linear_dx`. Each has a schema, a shape function, a
plain PyTorch implementation and a Triton kernel in the file of its name.
"""
