"""The plan: what each layer becomes, its bytes, and whether the run fits, before a weight is read.

It is made from the very modules that will train, on the meta device, so that it cannot drift from
them, and from the very micro-batches (`workload.py`). So it needs the model's configuration and no
weights, and no device of the kind that it is made for (`plan_elsewhere`). The expected time is the
step's arithmetic over the matrix throughput of this machine, measured in a fraction of a second.
"""

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qtune.data.feed import Feed
from qtune.errors import UserError
from qtune.export import exporter
from qtune.fitting import Fit, fit, num_shards
from qtune.machine import available_bytes
from qtune.memory import Memory
from qtune.model.adapt import adapt
from qtune.model.forward import packs
from qtune.model.skeleton import meta_model
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe
from qtune.recompute_choice import Recompute
from qtune.train.recompute import Policy
from qtune.train.speed import step_flops
from qtune.workload import Workload, workload

# a training step takes this many times its matrix products: attention, norms, loss, dequantizing
# (measured with the quickstart on two AMX cores; the bar shows the true rate)
OVERHEAD = 1.4
# objectives that also ask the model without its adapter
WITH_REFERENCE = {"dpo", "kto"}


@dataclass(frozen=True)
class Layer:
    """A linear layer in the run: its matrix [O, I], how it is stored, and in how many bytes."""

    name: str
    shape: tuple[int, int]
    format: str
    size_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and need; bytes of memory are those of each device."""

    layers: list[Layer]
    num_parameters: int
    num_trained: int
    memory: Memory
    recompute: Recompute
    available_bytes: int
    num_processes: int
    steps: int
    tokens_per_step: int
    matrix_flops_per_s: float | None
    """What a device does in bf16 matrix products; None for devices that are not here."""
    expected_minutes: float | None
    disk_bytes: int
    """What the run will write: checkpoints and exports."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def make_plan(
    recipe: Recipe,
    folder: Path,
    feed: Feed,
    device: torch.device,
    num_processes: int = 1,
    *,
    free_bytes: int | None = None,
    begun_with: Policy | None = None,
) -> Plan:
    """The plan of a run on the model in `folder` with the samples of this feed.

    `free_bytes` is what the run may take on each device, by default what is free on this one;
    `begun_with` is the policy of recomputation of a run that goes on. Raises UserError where the
    run needs more memory than there is, or settings fit no layer.
    """
    free = available_bytes(device) if free_bytes is None else free_bytes
    planner = _Planner(recipe, folder, feed, num_processes)
    return planner.plan(device, free, begun_with, matrix_flops_per_s(device))


def plan_elsewhere(
    recipe: Recipe, folder: Path, feed: Feed, memory: str, num_processes: int = 1
) -> Plan:
    """The plan of a run on GPUs with so much `memory` each ("24GiB"), which need not be here.

    Of the model `folder` need only hold the configuration. Raises UserError as `make_plan` does.
    """
    planner = _Planner(recipe, folder, feed, num_processes)
    return planner.plan(torch.device("cuda"), size_bytes(memory), None, None)


class _Planner:
    """A run on the meta device: its model, and what it has to do."""

    def __init__(self, recipe: Recipe, folder: Path, feed: Feed, num_processes: int) -> None:
        self._recipe, self._folder, self._num_processes = recipe, folder, num_processes
        config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
        base = meta_model(config, recipe)
        linears = [(n, m) for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
        self._layers = [_layer(name, layer) for name, layer in linears]
        self._model = adapt(base, recipe)
        self._steps = num_steps(recipe, feed.num_rows)
        packing = recipe.data.packing and packs(base)
        self._load: Workload = workload(recipe, feed, self._steps, num_processes, packing=packing)

    def plan(
        self, device: torch.device, free: int, begun: Policy | None, rate: float | None
    ) -> Plan:
        fits = fit(self._model, self._load, device, free, begun)
        seconds = None if rate is None else self._step_flops(fits) * OVERHEAD / rate
        return Plan(
            layers=self._layers,
            num_parameters=self._num_parameters(),
            num_trained=self._num_trained(),
            memory=fits.memory,
            recompute=fits.recompute,
            available_bytes=free,
            num_processes=self._num_processes,
            steps=self._steps,
            tokens_per_step=self._load.tokens_per_step,
            matrix_flops_per_s=rate,
            expected_minutes=None if seconds is None else self._steps * seconds / 60,
            disk_bytes=self._disk_bytes(fits.memory),
        )

    def _num_parameters(self) -> int:
        return sum(layer.shape[0] * layer.shape[1] for layer in self._layers)

    def _num_trained(self) -> int:
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def _step_flops(self, fits: Fit) -> float:
        """Operations in products of a step on one device.

        The forward pass, about half of them, comes twice where blocks run again in the backward
        pass, and once more where a reference is asked.
        """
        again = (fits.recompute.policy == "all") + (self._recipe.train.objective in WITH_REFERENCE)
        flops_per_token = sum(step_flops(self._model)) * (1 + again / 2)
        return flops_per_token * self._load.tokens_per_step / self._num_processes

    def _disk_bytes(self, memory: Memory) -> int:
        """Checkpoints, adapter, and the most that exports can be; both merges exist for a while."""
        frozen = sum(p.nbytes for p in self._model.parameters() if not p.requires_grad)
        adapter = sum(p.nbytes for p in self._model.parameters() if p.requires_grad)
        state = memory.optimizer * num_shards(self._load)
        stored = sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))
        # where only the configuration is there, two bytes for each weight
        base = stored or 2 * self._num_parameters()
        exports = sum(self._export_bytes(name, frozen, base) for name in self._recipe.export)
        kept = state + adapter * (2 if self._recipe.train.keep_best else 1)
        codes = frozen if self._recipe.train.merge_aware else 0
        exports += adapter * len(self._recipe.export)
        return (self._recipe.train.keep + 1) * kept + adapter + codes + exports

    def _export_bytes(self, name: str, frozen: int, base: int) -> int:
        """The most that an export takes beside an adapter while it is written: merges lie there in
        16 bits, and those in 16 bits twice.
        """
        if name in exporter.ADAPTERS:
            return 0
        if exporter.form_of(name, self._recipe) == "pair":
            return frozen
        return (
            2 * base if exporter.load_exporter(name).quant(self._recipe) is None else frozen + base
        )


def num_steps(recipe: Recipe, num_rows: int | None) -> int:
    """Optimizer steps of the run; raises UserError where all of them are warm-up."""
    settings = recipe.train
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None and num_rows is not None
    steps = max(1, round(settings.epochs * num_rows / settings.batch_size))
    if settings.warmup_steps >= steps:
        raise UserError(
            f"train.warmup_steps ({settings.warmup_steps}) must be less than the {steps} steps "
            f"that train.epochs ({settings.epochs}) takes with {num_rows} rows"
        )
    if settings.warmup_steps + (settings.decay_steps or 0) > steps:
        raise UserError(
            f"train.warmup_steps ({settings.warmup_steps}) and train.decay_steps "
            f"({settings.decay_steps}) together are more than the {steps} steps that train.epochs "
            f"({settings.epochs}) takes with {num_rows} rows"
        )
    return steps


def size_bytes(text: str) -> int:
    """Bytes of a size such as 24GiB, 80GB or 512 MiB; UserError: it is none."""
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"--memory {text}: not a size; write it as 24GiB, or as 24GB")
    number, prefix, binary = found.groups()
    power = 1 + "KMGT".index(prefix.upper())
    return int(float(number) * (1024 if binary else 1000) ** power)


def matrix_flops_per_s(device: torch.device) -> float:
    """Floating-point operations per second of a bf16 matrix product on the device."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        # reading one number waits for the product
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _layer(name: str, layer: torch.nn.Linear) -> Layer:
    shape = (layer.out_features, layer.in_features)
    size = sum(parameter.nbytes for parameter in layer.parameters())
    if isinstance(layer, QuantLinear):
        return Layer(name, shape, layer.storage.format, size)
    return Layer(name, shape, str(layer.weight.dtype).removeprefix("torch."), size)
