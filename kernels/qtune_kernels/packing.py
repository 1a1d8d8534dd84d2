"""The one storage layout of codes, used as it is by forward, backward and dequantize.

The matrix is read as a flat row of codes and cut into segments of 64 neighbours, which is one
quantization group of 64. Eight-bit codes are one byte each. Narrower ones share 64 bytes: byte j
holds code j of two segments (4 bits) or of four (2 bits), the first in its lowest bits. Three bits
are a plane of two bits for eight segments and a plane of one, their high bit. So a kernel splits a
tile of bytes into tiles of weights without moving anything between lanes, and each has one scale.

The segments that share bytes are a run; a last run that is not full is filled up with code 0. The
flat order makes every size convertible to and from bitsandbytes without loss, whose groups also
run over the flat tensor.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

SEGMENT = 64
# segments that lie in the same bytes, by the bits of a code
RUN_SEGMENTS = {8: 1, 4: 2, 3: 8, 2: 4}
# segments that the fused kernels read as a whole, of which rows are to be made up
TILE_SEGMENTS = {8: 2, 4: 2, 3: 8, 2: 4}
# segments that they decode at a time, a strip: of 3 bits half of those, whose low bits are 64 bytes
STRIP_SEGMENTS = {8: 2, 4: 2, 3: 4, 2: 4}


def code_bits(levels: Sequence[float]) -> int:
    """Bits of a code that stands for one of `levels`; there are none for 8 bits."""
    return {0: 8, 16: 4, 8: 3, 4: 2}[len(levels)]


def run_weights(bits: int) -> int:
    """Weights of a run, the smallest number that takes whole bytes of its own."""
    return 1 if bits == 8 else RUN_SEGMENTS[bits] * SEGMENT


def packed_bytes(num_weights: int, bits: int) -> int:
    """Bytes that `num_weights` codes take in storage."""
    run = run_weights(bits)
    return -(-num_weights // run) * run * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Storage bytes, uint8 [packed_bytes], of codes, uint8 of any shape, taken in flat order."""
    codes = codes.reshape(-1)
    if bits == 8:
        return codes
    full = pad(codes, (0, -codes.numel() % run_weights(bits)))
    if bits != 3:
        return _join(full.view(-1, RUN_SEGMENTS[bits], SEGMENT), bits).view(-1)
    runs = full.new_empty(full.numel() // run_weights(3), 3, SEGMENT)
    runs[:, :2] = _join((full & 3).view(-1, 4, SEGMENT), 2).view(-1, 2, SEGMENT)
    runs[:, 2] = _join((full >> 2).view(-1, 8, SEGMENT), 1)
    return runs.view(-1)


def unpack(packed: Tensor, bits: int, num_weights: int) -> Tensor:
    """Codes, uint8 [num_weights], of storage bytes made by `pack`."""
    if bits == 8:
        return packed
    if bits != 3:
        return _split(packed.view(-1, SEGMENT), bits).view(-1)[:num_weights]
    runs = packed.view(-1, 3, SEGMENT)
    low = _split(runs[:, :2].reshape(-1, SEGMENT), 2).view(-1)
    high = _split(runs[:, 2], 1).view(-1)
    return (low | high << 2)[:num_weights]


def to_bitsandbytes(packed: Tensor, num_weights: int, zero_code: int = 7) -> Tensor:
    """bitsandbytes' bytes, uint8 [ceil(num_weights / 2), 1], of 4-bit storage.

    Code 2i is in the high nibble of byte i, code 2i + 1 in the low one. The last nibble of an odd
    number is the code of 0, which is 7 for NF4 and 0 for FP4.
    """
    codes = pad(unpack(packed, 4, num_weights), (0, num_weights % 2), value=zero_code)
    return (codes[0::2] << 4 | codes[1::2]).unsqueeze(1)


def from_bitsandbytes(packed: Tensor, num_weights: int) -> Tensor:
    """Our storage bytes, uint8, of NF4 or FP4 that bitsandbytes packed; undoes the above."""
    flat = packed.reshape(-1)
    codes = flat.new_empty(flat.numel(), 2)
    codes[:, 0] = flat >> 4
    codes[:, 1] = flat & 15
    return pack(codes.view(-1)[:num_weights], 4)


def _join(fields: Tensor, bits: int) -> Tensor:
    """Bytes [N, 64] of fields [N, 8 / bits, 64], the first in the lowest bits."""
    joined = fields[:, 0].clone()
    for place in range(1, 8 // bits):
        joined |= fields[:, place] << bits * place
    return joined


def _split(tiles: Tensor, bits: int) -> Tensor:
    """The fields [N, 8 / bits, 64] of bytes [N, 64]; undoes `_join`."""
    fields = tiles.new_empty(tiles.shape[0], 8 // bits, SEGMENT)
    for place in range(8 // bits):
        fields[:, place] = tiles >> bits * place & (1 << bits) - 1
    return fields
