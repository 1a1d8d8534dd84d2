"""Bytes of a training step, counted on the model itself rather than estimated.

The model is run once on the `meta` device, where tensors have shapes and no data. Autograd then holds the tensors it
would hold in training, and their bytes are added up: whatever the architecture and the recipe do, the count follows.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qtune.data.collate import Batch
from qtune.model.forward import forward_logits
from qtune.quant.linear import QuantLinear

# AdamW keeps two moments beside each float32 weight and its gradient
MOMENTS = 2
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


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


def training_memory(model: nn.Module, batch: Batch, *, checkpointing: bool) -> Memory:
    """The bytes of a step of a model on the meta device with the batch, also there, as its largest micro-batch."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept, logits = _kept_for_backward(model, batch)
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


class Peak:
    """Most memory taken since this was made, in bytes: allocated on a GPU, resident on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif CLEAR_REFS.exists():
            # 5 resets the high-water mark of the resident memory
            CLEAR_REFS.write_text("5")
        self._before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        return _most_resident() - self._before


def available_bytes(device: torch.device) -> int:
    """Memory that a run may take on the device now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _most_resident() -> int:
    """High-water mark of the resident memory in bytes; where the system keeps none, what is resident now."""
    if not STATUS.exists():
        return int(psutil.Process().memory_info().rss)
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _kept_for_backward(model: nn.Module, batch: Batch) -> tuple[int, Tensor]:
    """Bytes of the distinct tensors, not parameters, that autograd saves in a forward pass; the logits."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = forward_logits(model, batch)
    for tensor in (*model.parameters(), logits):
        kept.pop(_storage(tensor), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), logits


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _with_checkpointing(model: nn.Module, batch: Batch, kept: int) -> int:
    """Bytes where blocks keep only their inputs: all of these, and what one block keeps while it is recomputed."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    inputs = batch.input_ids.numel() * config.hidden_size * config.dtype.itemsize
    return inputs * config.num_hidden_layers + kept // config.num_hidden_layers


def _largest_dense(model: nn.Module) -> int:
    """Bytes of the largest quantized matrix in the compute dtype."""
    sizes = [
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
    ]
    return max(sizes, default=0)
