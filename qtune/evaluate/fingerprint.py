"""What tells one model from another: a hash of everything that its answers depend on.

That are its tensors and its tokenizer, and, for what is in neither (adapters that are switched off,
their scaling, weights that another engine keeps), its logits after a fixed row of tokens. Logits
that another machine rounds otherwise make another hash: then something is measured once more.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from qtune.evaluate.mode import measuring
from qtune.model.forward import inner_model

# tokens of the row, and a step through the vocabulary that visits all of it
LENGTH = 64
PRIME = 7919


def fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 in hex: the same for the same weights, adapters and tokenizer."""
    found = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    found.update(_bytes(_probe(model)))
    return found.hexdigest()


def _probe(model: nn.Module) -> Tensor:
    """Logits [1, T, V] after tokens from all over the vocabulary."""
    inner = inner_model(model)
    vocabulary = inner.config.get_text_config().vocab_size
    ids = torch.arange(1, LENGTH + 1, device=inner.device).unsqueeze(0) * PRIME % vocabulary
    with measuring(model):
        logits: Tensor = model(input_ids=ids).logits
    return logits


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = whole.detach().cpu().contiguous().flatten()
    made: bytes = flat.view(torch.uint8).numpy().tobytes()
    return made
