"""The one storage layout of codes, used as it is by forward, backward and dequantize.

Eight-bit codes are one byte each. Four-bit codes are "half-split": the matrix is read as a flat
row of codes, cut into runs of 128; byte j of a run's 64 bytes holds code j in its low and code j +
64 in its high nibble. So each nibble plane of a run is 64 neighbouring weights, which is one
quantization group of 64, and a kernel splits a tile of bytes into two tiles of weights without
moving anything between lanes. The flat order makes every size convertible to and from bitsandbytes
without loss, whose groups also run over the flat tensor; a last run shorter than 128 is filled up
with zero codes.
"""

from torch import Tensor
from torch.nn.functional import pad

RUN = 128


def packed_bytes(num_weights: int, bits: int) -> int:
    """Bytes that `num_weights` codes take in storage."""
    return num_weights if bits == 8 else -(-num_weights // RUN) * (RUN // 2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Storage bytes, uint8 [packed_bytes], of codes, uint8 of any shape, taken in flat order."""
    codes = codes.reshape(-1)
    if bits == 8:
        return codes
    low, high = pad(codes, (0, -codes.numel() % RUN)).view(-1, 2, RUN // 2).unbind(1)
    return (low | high << 4).view(-1)


def unpack(packed: Tensor, bits: int, num_weights: int) -> Tensor:
    """Codes, uint8 [num_weights], of storage bytes made by `pack`."""
    if bits == 8:
        return packed
    runs = packed.view(-1, 1, RUN // 2)
    codes = packed.new_empty(runs.shape[0], 2, RUN // 2)
    codes[:, :1] = runs & 15
    codes[:, 1:] = runs >> 4
    return codes.view(-1)[:num_weights]


def to_bitsandbytes(packed: Tensor, num_weights: int) -> Tensor:
    """bitsandbytes' bytes, uint8 [ceil(num_weights / 2), 1].

    Code 2i is in the high nibble of byte i, code 2i + 1 in the low one.
    """
    codes = pad(unpack(packed, 4, num_weights), (0, num_weights % 2), value=7)
    return (codes[0::2] << 4 | codes[1::2]).unsqueeze(1)


def from_bitsandbytes(packed: Tensor, num_weights: int) -> Tensor:
    """Our storage bytes, uint8, of bytes that bitsandbytes packed; undoes `to_bitsandbytes`."""
    flat = packed.reshape(-1)
    codes = flat.new_empty(flat.numel(), 2)
    codes[:, 0] = flat >> 4
    codes[:, 1] = flat & 15
    return pack(codes.view(-1)[:num_weights], 4)
