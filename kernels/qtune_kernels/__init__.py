"""Kernels for training on quantized weights: on CUDA by Triton, on the CPU by LLVM or PyTorch.

Shapes use one letter per dimension, here and everywhere in qtune: O out features, I in features,
G group size (weights that share a scale), T tokens or rows, R adapter rank, V vocabulary,
N targets, B batch, H heads, K heads of keys and values, D head size.

Ops (namespace `qtune`), each with its schema, shape function and plain PyTorch version in the file
that is named, and its Triton kernels in `*_triton.py` beside it:

    file               ops                           result
    quantize           absmax, encode                scales [O I / G], storage bytes of W [O, I]
    dequantize         dequantize                    W [O, I]
    linear             linear, linear_dx             y = x W^T [..., O], dx = dy W [..., I]
    lora               lora_linear                   y with an adapter [..., O], and x A^T [T, R]
                       lora_linear_backward          dx [..., I], dA [R, I], dB [O, R]
    scaled_linear      scaled_linear                 y with trained scales and zero points [..., O]
    scale_gradient     scale_gradient                sums of dW, and of dW times levels [O I / G]
    hadamard           hadamard                      x R or x R^T [..., I]
    e8p                e8p_dequantize                W [O, I] of words for eight weights
                       e8p_linear, e8p_linear_dx     y [..., O], dx [..., I]
    clip_errors        clip_errors                   squared errors of groups [shares, O I / G]
    quantize_rows      quantize_rows                 x [T, I] in 8 bits, a scale a row, outliers
    linear_int8        linear_int8                   y [..., O] of such x
    norm               rms_norm, rms_norm_dx         y, dx [..., I]
                       add_rms_norm                  y and the sum [..., I]
    swiglu             gated                         h [..., I]
                       gated_backward                dgate and dup [..., I]
    rope               rope                          q [B, H, T, D] and k [B, K, T, D], rotated
    attention          packed_attention              y [T, H, D], lse [H, T]
                       packed_attention_backward     dq [T, H, D], dk and dv [T, K, D]
    cross_entropy      linear_cross_entropy          losses [N], dhidden [N, I]
                       cross_entropy                 losses [N], dlogits [N, V]
    softmax_gradient   softmax_gradient_             losses [N]; logits [N, V] become gradients
                       softmax_losses                losses [N]
"""
