"""Bytes of a training step, counted on the model itself rather than estimated.

The model is run once on the `meta` device, where tensors have shapes and no data. Autograd then
holds the tensors it would hold in training, and their bytes are added up: whatever the architecture
and the recipe do, the count follows.
"""

import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from qtune.data.collate import Batch
from qtune.model.forward import forward_logits
from qtune.quant.linear import QuantLinear

# AdamW keeps two moments beside each float32 weight and its gradient
MOMENTS = 2
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step by what they are for."""

    weights: int
    """Frozen weights, packed or not."""
    adapter: int
    """Trained weights."""
    gradients: int
    """Their gradients."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """What autograd keeps of the largest micro-batch between forward and backward, logits apart."""
    logits: int
    """Logits of its supervised tokens and their gradient."""
    temporary: int
    """The largest matrix while it is dequantized."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


def training_memory(
    model: nn.Module, batch: Batch, device: torch.device, *, checkpointing: bool
) -> Memory:
    """The bytes of a step on `device` whose largest micro-batch is `batch`.

    Model and batch are on `meta`.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with _FusedAttention(widens=device.type == "cpu"):
        kept, logits = kept_for_backward(model, batch)
    if checkpointing:
        kept = _with_checkpointing(model, batch, kept)
    return Memory(
        weights=sum(p.nbytes for p in frozen),
        adapter=trained,
        gradients=trained,
        optimizer=MOMENTS * trained,
        activations=kept,
        logits=2 * logits.nbytes,
        temporary=_largest_dense(model),
    )


def kept_for_backward(model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
    """Bytes that autograd keeps of a forward pass, parameters and logits apart; the logits."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = forward_logits(model, batch)
    for tensor in (*model.parameters(), logits):
        kept.pop(_storage(tensor), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), logits


class Peak:
    """Most memory taken since this was made, in bytes: allocated on a GPU, resident on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR_REFS.exists():
            # 5 resets the high-water mark of the resident memory; not every sandbox has it
            with suppress(OSError):
                CLEAR_REFS.write_text("5")
        self._before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        # the two counters differ by a few pages
        return max(0, _most_resident() - self._before)


def available_bytes(device: torch.device) -> int:
    """Memory that a run may take on the device now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # processes beside this one on the machine need as much
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(psutil.virtual_memory().available, _container_bytes())) // num_processes


def _most_resident() -> int:
    """High-water mark of the resident memory in bytes; what is resident now where none is kept."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _container_bytes() -> float:
    """What the container's limit leaves, in bytes; file caches are given back when needed."""
    if not (CGROUP / "memory.max").is_file():
        return math.inf
    limit = (CGROUP / "memory.max").read_text().strip()
    if limit == "max":
        return math.inf
    stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
    return int(limit) - used


class _FusedAttention(TorchFunctionMode):
    """On `meta`, attention as devices run it: PyTorch would take the path that keeps [T, T] there.

    `widens` says that it works in float32, as `model.attention` does on the CPU.
    """

    def __init__(self, *, widens: bool) -> None:
        super().__init__()
        self._widens = widens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (t.float() if self._widens else t for t in args)
        return _fused_attention(query, key, value, **kwargs)


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # the mask is not kept, and what it hides changes no shape
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y: Tensor = fused(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return y


def _storage(tensor: Tensor) -> int:
    at: int = tensor.untyped_storage()._cdata
    return at


def _with_checkpointing(model: nn.Module, batch: Batch, kept: int) -> int:
    """Bytes where blocks keep only their inputs: these, and all of one block while it is redone."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    inputs: int = batch.input_ids.numel() * config.hidden_size * config.dtype.itemsize
    num_blocks: int = config.num_hidden_layers
    return inputs * num_blocks + kept // num_blocks


def _largest_dense(model: nn.Module) -> int:
    """Bytes of the largest quantized matrix in the compute dtype."""
    sizes = [
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    ]
    return max(sizes, default=0)
