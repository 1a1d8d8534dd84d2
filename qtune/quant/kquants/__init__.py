"""Block encoders for the types of GGUF files, Q8_0 down to Q2_K: weights in, bytes of blocks out.

    from qtune.quant.kquants.encoder import KINDS, block_size, encode, type_size

    encode(weight, kind, importance=None) -> uint8 [O, row_bytes]
        weight: floats [O, I], on any device; I must be a multiple of block_size(kind)
        kind: one of KINDS: F32 F16 BF16 Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL
        importance: what an input is worth, [I]: the mean of its squares, as in llama.cpp's imatrix;
            without it all inputs count the same
    block_size(kind) -> weights of a block: 256 for K types, 32 for the others, 1 for floats
    type_size(kind) -> bytes of a block
    row_bytes(kind, I) -> bytes of a row: I / block_size * type_size
    fitting_kind(kind, I) -> kind where rows are whole blocks of it, else what llama.cpp takes then

A block holds whole numbers and the steps between them, which `fit` finds (search, descent) and
`layout` turns into bytes. ggml's own encoders are the measure: the same bytes mean the same weights
(package `gguf`), and the weighted squared error is no larger (tests/quant/kquants).
"""
