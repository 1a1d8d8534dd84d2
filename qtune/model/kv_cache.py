"""Keys and values of past tokens in 8, 4 or 2 bits (KIVI, arXiv 2402.02750).

Keys have a few channels that stand out in every token, values have none. So the keys of 32 tokens
share a range in each channel, and 32 channels of a token's values share one. The last 128 tokens
and more, up to a full group, stay as they are: attention looks at them most. A group is quantized
once, when it leaves that window, and never again.

For attention a layer's past is decoded whole, one layer at a time. Layers with a sliding window or
a recurrent state keep their own cache, which does not grow.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

GROUP = 32
RECENT = 128
BITS = (8, 4, 2)


class Packed(NamedTuple):
    """Numbers in few bits: number = code * step + least, of groups along one dimension."""

    codes: Tensor
    """Several to a byte along the tokens, uint8 [B, H, GROUP * bits / 8, D]."""
    steps: Tensor
    least: Tensor

    def followed_by(self, later: "Packed") -> "Packed":
        """These and later tokens."""
        return Packed(*(torch.cat(pair, 2) for pair in zip(self, later, strict=True)))

    def rows(self, index: Tensor) -> "Packed":
        """Those of these rows of the batch."""
        return Packed(*(tensor.index_select(0, index) for tensor in self))


def packed_cache(config: PretrainedConfig, bits: int) -> DynamicCache:
    """An empty cache for a model with that configuration, its growing layers in so many bits."""
    cache = DynamicCache(config=config)
    cache.layers = [PackedLayer(bits) if type(it) is DynamicLayer else it for it in cache.layers]
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that are kept."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, PackedLayer):
            total += layer.nbytes()
        elif isinstance(layer, DynamicLayer) and layer.keys is not None:
            assert layer.values is not None
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def bits_of_a_number(bits: int) -> float:
    """Bits of a stored key or value; 16 are as they are, others have two half numbers a group."""
    return bits if bits == 16 else bits + 2 * 16 / GROUP


class PackedLayer(CacheLayerMixin):
    """The past of one attention layer; `update` returns keys and values [B, H, T, D] of all of it.

    `keys` and `values` are the recent ones, in the dtype of the model.
    """

    device: torch.device

    def __init__(self, bits: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        assert bits in BITS
        self._bits = bits
        self._old: tuple[Packed, Packed] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty keys and values like those that are coming."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.device, self.is_initialized = key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, [B, H, T, D], now with these at the end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states, value_states
        recent = [torch.cat(pair, -2) for pair in zip(self._recent(), new, strict=True)]
        self.keys, self.values = keys, values = recent
        if self._old is not None:
            keys, values = (
                torch.cat([unpack(old, self._bits, late.dtype), late], -2)
                for old, late in zip(self._old, recent, strict=True)
            )
        self._pack_away()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the past."""
        return self._num_old() + (self._recent()[0].shape[-2] if self.is_initialized else 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that so many new queries see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        packed = [tensor for old in self._old or () for tensor in old]
        return sum(t.nbytes for t in (*packed, *self._recent()))

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self._old = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows of the batch instead, int64 [B]."""
        self.keys, self.values = (tensor.index_select(0, beam_idx) for tensor in self._recent())
        if self._old is not None:
            keys, values = self._old
            self._old = keys.rows(beam_idx), values.rows(beam_idx)

    def _recent(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _num_old(self) -> int:
        return 0 if self._old is None else self._old[0].codes.shape[2] * 8 // self._bits

    def _pack_away(self) -> None:
        """Quantize the oldest groups beyond the recent tokens."""
        keys, values = self._recent()
        num = (keys.shape[-2] - RECENT) // GROUP * GROUP
        if num <= 0:
            return
        width = channels_of_group(values.shape[-1])
        old_keys = pack(keys[:, :, :num], self._bits, (GROUP, 1))
        old_values = pack(values[:, :, :num], self._bits, (1, width))
        if self._old is not None:
            old_keys = self._old[0].followed_by(old_keys)
            old_values = self._old[1].followed_by(old_values)
        self._old = old_keys, old_values
        # clones: a view would keep what was packed
        self.keys, self.values = keys[:, :, num:].clone(), values[:, :, num:].clone()


def channels_of_group(width: int) -> int:
    """Channels of a token's values that share a range: 32, or all where that does not divide."""
    return width if width % GROUP else GROUP


def pack(numbers: Tensor, bits: int, group: tuple[int, int]) -> Packed:
    """Numbers [B, H, T, D] in `bits` bits, T a multiple of 8, groups of tokens times channels."""
    boxes = _boxes(numbers.float(), group)
    least, most = boxes.amin((3, 5), keepdim=True), boxes.amax((3, 5), keepdim=True)
    steps = ((most - least) / (2**bits - 1)).half()
    least = least.half()
    # codes for what is stored; a group of equal numbers has no step
    codes = (boxes - least.float()) / steps.float().where(steps != 0, 1)
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8).view(numbers.shape)
    return Packed(_join(codes, bits), steps, least)


def unpack(packed: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers [B, H, T, D] in `dtype`."""
    codes = _split(packed.codes, bits)
    _, _, rows, _, columns, _ = packed.steps.shape
    group = codes.shape[2] // rows, codes.shape[3] // columns
    boxes = _boxes(codes.float(), group)
    return (boxes * packed.steps.float() + packed.least.float()).view(codes.shape).to(dtype)


def _boxes(tensor: Tensor, group: tuple[int, int]) -> Tensor:
    """[B, H, T, D] as [B, H, T / t, t, D / d, d]."""
    boxes: Tensor = tensor.unflatten(3, (-1, group[1])).unflatten(2, (-1, group[0]))
    return boxes


def _join(codes: Tensor, bits: int) -> Tensor:
    """Bytes [B, H, T * bits / 8, D] of codes [B, H, T, D], neighbours in T together."""
    fields: Tensor = codes.unflatten(2, (-1, 8 // bits))
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.uint8)[:, None]
    return (fields << shifts).sum(3, dtype=torch.uint8)


def _split(joined: Tensor, bits: int) -> Tensor:
    """The codes; undoes `_join`."""
    shifts = torch.arange(0, 8, bits, device=joined.device, dtype=torch.uint8)[:, None]
    return (joined.unsqueeze(3) >> shifts & (1 << bits) - 1).flatten(2, 3)
