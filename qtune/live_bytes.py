"""Bytes of the tensors that are alive while a piece of code runs.

Every result of an operation is seen as it is made, and its storage again as it is freed, whoever
held it: autograd, a checkpoint's cache, a variable. So nothing has to be known about who keeps what
and why. It works on every device, `meta` included, where nothing is really allocated.
What an operation takes and gives back inside itself is not seen.
"""

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts tensors made within it, but for those that share the storage of an `ignored` one."""

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at any moment so far."""
        # held, so that no other storage takes the place of one
        self._ignored = [tensor.untyped_storage() for tensor in ignored]
        self._known: dict[int, ref[torch.UntypedStorage] | None] = {
            storage._cdata: None for storage in self._ignored
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        at, size = storage._cdata, storage.nbytes()
        if at in self._known:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._known[at]

        self._known[at] = ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
