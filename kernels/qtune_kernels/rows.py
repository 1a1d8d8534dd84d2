"""Rows with free memory behind each one, and how a later op knows that it is free.

A LoRA linear multiplies [x, x A^T] by [W, s B]^T: one product, if x A^T can be written right behind
each row of x (`lora_products.forward_extended`). The op that makes x leaves the space
where it is asked to. Strides cannot tell such rows from a slice of somebody's tensor, whose
neighbours must not be touched, so the storages made here are remembered, weakly, and nothing else
counts.

What lies in the room is good within one op only: the layers that share an input each write there.
So they must not run on two CUDA streams at once.
"""

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage

from qtune_kernels.linear_tiles import most_fused_rows

# elements behind each row: LoRA up to that rank; 64 keeps rows of 16-bit numbers on 128 bytes
ROOM = 64
# elements: rows of 16-bit numbers so wide start on 16 bytes, as vectors and a vendor's GEMM want
ALIGNMENT = 8
# the type of device on which ops leave room
DEVICE = "cuda"


class _Layout(NamedTuple):
    """How rows lie in a storage: `columns` elements of `dtype`, the next row `width` further on."""

    columns: int
    width: int
    dtype: torch.dtype


_layouts: WeakKeyDictionary[UntypedStorage, _Layout] = WeakKeyDictionary()


def with_room(
    num_rows: int, columns: int, dtype: torch.dtype, device: torch.device, room: int = ROOM
) -> Tensor:
    """Uninitialized rows [T, columns] with `room` free elements behind each, the last included."""
    buffer = torch.empty(num_rows, columns + room, dtype=dtype, device=device)
    _layouts[buffer.untyped_storage()] = _Layout(columns, columns + room, dtype)
    return buffer.narrow(1, 0, columns)


def empty_rows(like: Tensor, room: int) -> Tensor:
    """Uninitialized results of an op, shaped like `like` [..., I], with that room if on CUDA.

    Kernels and shape functions both make their results here, so their strides agree. On other
    devices rows are contiguous whatever `room` says, which is decided here for all ops: PyTorch's
    bf16 product on the CPU reads beyond rows that lie apart, and plain PyTorch leaves no room.
    """
    if room == 0 or like.device.type != DEVICE:
        return like.new_empty(like.shape)
    *leading, columns = like.shape
    rows = with_room(math.prod(leading), columns, like.dtype, like.device, room)
    return rows.view(like.shape)


def wanted_room(x: Tensor) -> int:
    """ROOM if a layer with an adapter could use it behind rows like x [..., I], else 0.

    That is what to ask of the op that makes the rows. Layers use room on CUDA, with more rows than
    the fused kernels take; the norms of heads, [B, T, H, D], go to no layer. Room adds 64/I to the
    memory of the rows, 1.6 % with I = 4096. Plans are made on `meta`, where there is none, and
    leave that out.
    """
    columns = x.shape[-1]
    if x.device.type != DEVICE or x.dim() > 3 or columns % ALIGNMENT != 0:
        return 0
    # torch.compile cannot trace the reading of a table; what it is used on has many rows
    few = 0 if torch.compiler.is_compiling() else most_fused_rows(x.device)
    return ROOM if x.numel() > columns * few else 0


def room_behind(rows: Tensor) -> int:
    """How many free elements lie behind each row of [T, I]; 0 unless `with_room` made the rows."""
    layout = _layouts.get(rows.untyped_storage())
    if layout is None or rows.dim() != 2:
        return 0
    found = _Layout(rows.shape[1], rows.stride(0), rows.dtype)
    starts_a_row = rows.storage_offset() % layout.width == 0 and rows.stride(1) == 1
    return layout.width - layout.columns if found == layout and starts_a_row else 0


def extended(rows: Tensor, num: int) -> Tensor:
    """The rows [T, I] together with the first `num` elements behind each: [T, I + num].

    Writing there leaves the version counter of `rows` alone, as it leaves their values: autograd
    would otherwise take rows that it has saved for changed. Raises ValueError without that room.
    """
    if num > room_behind(rows):
        raise ValueError(f"there is no room for {num} elements behind these rows")
    everything = rows.new_empty(0).set_(rows.untyped_storage())
    return everything.as_strided(
        (rows.shape[0], rows.shape[1] + num), rows.stride(), rows.storage_offset()
    )
