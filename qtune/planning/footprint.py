"""Bytes that a model takes in training and in use, from its configuration alone.

As in `memory.py` nothing is estimated: the model is built on the meta device with its layers as
they will be stored, and a step, or the reading of prompts, is run there once. Formats that compute
alike differ in weights only, so they share the run.
"""

from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from qtune.data.sample import Sample
from qtune.live_bytes import LiveBytes
from qtune.memory import largest_dense, training_memory
from qtune.meta_mode import as_on
from qtune.model.forward import takes_logits_to_keep
from qtune.model.kv_cache import cache_bytes, packed_cache
from qtune.model.load import add_adapter
from qtune.planning.depth import Parts, blocks_are_alike, by_depth
from qtune.planning.sizes import Sizes, base_on_meta, sizes
from qtune.recipe import Data, Lora, Quant, Recipe, Train
from qtune.recipe_train import OptimizerName
from qtune.train import recompute
from qtune.train.recompute import POLICIES, ChangedInPlaceError, Policy

Made = TypeVar("Made")


@dataclass(frozen=True)
class Request:
    """What a model is wanted for, and in how much memory."""

    memory_bytes: int
    context: int
    """Tokens of a row."""
    batch: int = 1
    """Rows at a time."""
    serve: bool = False
    kv_bits: int = 16
    rank: int = 16
    optimizer: OptimizerName = "adamw"
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for, and what a training step makes again to need no more."""

    parts: Parts
    policy: Policy | None = None

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


class Footprint:
    """A model's bytes; `name` is what a recipe calls it. What takes time is kept."""

    def __init__(self, name: str, config: Any) -> None:
        self.name, self.config = name, config
        self._kept: dict[Hashable, Any] = {}
        self.num_parameters = self.sizes(Quant(format=None)).num_parameters
        self._alike = blocks_are_alike(base_on_meta(config, Quant(format=None)), config)
        text = config.get_text_config()
        self.most_context: int = getattr(text, "max_position_embeddings", None) or 1 << 17

    @property
    def label(self) -> str:
        """The name without the folders around it."""
        return self.name.rstrip("/").rpartition("/")[2]

    def sizes(self, quant: Quant) -> Sizes:
        """Bytes of the weights; UserError where `quant` does not suit the model."""
        return self._once(repr(quant), lambda: sizes(self.config, quant))

    def need(self, quant: Quant, request: Request) -> Need:
        """The bytes of what is requested; in training under the fastest policy that fits, if any.

        Weights are those of `quant`, where they may differ from layer to layer.
        """
        weights = {"weights": self.sizes(quant).total_bytes}
        same = _computing_alike(quant)
        if request.serve:
            return Need(weights | self._serving(same, request))
        least = self._with_policy(weights, same, request, POLICIES[-1])
        assert least is not None
        # that policy needs least: where it does not fit, none does
        if least.total > request.memory_bytes:
            return least
        for policy in POLICIES[:-1]:
            found = self._with_policy(weights, same, request, policy)
            if found is not None and found.total <= request.memory_bytes:
                return found
        return least

    def _with_policy(
        self, weights: Parts, quant: Quant, request: Request, policy: Policy
    ) -> Need | None:
        """The bytes under that policy; None where the model cannot follow it."""
        parts = self._training(quant, request, policy)
        return None if parts is None else Need(weights | parts, policy)

    def _training(self, quant: Quant, request: Request, policy: Policy) -> Parts | None:
        """Bytes of a step but for the frozen weights; None where the model cannot be run so."""
        wanted = replace(request, memory_bytes=0, kv_bits=16)

        def measure(config: Any) -> Parts | None:
            return _training(config, quant, wanted, policy)

        key = repr(quant), wanted, policy
        return self._once(key, lambda: by_depth(self.config, self._alike, measure))

    def _serving(self, quant: Quant, request: Request) -> Parts:
        wanted = replace(request, memory_bytes=0, rank=0)

        def measure(config: Any) -> Parts:
            return _serving(config, quant, wanted)

        key = repr(quant), wanted
        found = self._once(key, lambda: by_depth(self.config, self._alike, measure))
        assert found is not None
        return found

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        if key not in self._kept:
            self._kept[key] = make()
        found: Made = self._kept[key]
        return found


def _computing_alike(quant: Quant) -> Quant:
    """A form of which all others take the same way through the layers."""
    if quant.format is None:
        return Quant(format=None)
    if quant.format == "e8p":
        return quant
    return Quant(format="nf4", rotate=quant.rotate, method=quant.method, skip=quant.skip)


def _training(config: Any, quant: Quant, request: Request, policy: Policy) -> Parts | None:
    tokens = request.batch * request.context
    recipe = Recipe(
        model="",
        data=Data(train="", max_length=request.context),
        quant=quant,
        lora=Lora(rank=request.rank),
        train=Train(steps=1, micro_batch_tokens=tokens, optimizer=request.optimizer),
        run=Path("unused"),
    )
    model = add_adapter(base_on_meta(config, quant), recipe.lora)
    # all is learned, so there are as many logits as there can be
    learned = [0.0] + [1.0] * (request.context - 1)
    samples = [Sample("", [0] * request.context, learned, label=True)] * request.batch
    try:
        memory = training_memory(model, samples, request.device, policy, recipe)
    except ChangedInPlaceError:
        return None
    return {name: size for name, size in asdict(memory).items() if size and name != "weights"}


def _serving(config: Any, quant: Quant, request: Request) -> Parts:
    """Bytes of keys and values, and of all else at most, when prompts of that length are read."""
    model = base_on_meta(config, quant).eval()
    recompute.use(model, "none")
    ids = torch.zeros(request.batch, request.context, dtype=torch.int64, device="meta")
    past = _cache(config, request.kv_bits)
    last = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    held = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), as_on(request.device, model), LiveBytes(held) as live:
        model(input_ids=ids, past_key_values=past, use_cache=True, **last)
    kept = cache_bytes(past)
    return {"kv_cache": kept, "workspace": live.peak - kept, "temporary": largest_dense(model)}


def _cache(config: Any, bits: int) -> DynamicCache:
    return DynamicCache(config=config) if bits == 16 else packed_cache(config, bits)
