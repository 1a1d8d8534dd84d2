"""The plan: what each layer becomes, its bytes, and whether the run fits, before a weight is read.

It is made from the very modules that will train, on the meta device, so that it cannot drift from
them, and from the very micro-batches. The expected time is the step's arithmetic over the matrix
throughput of this machine, measured in a fraction of a second.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qtune.data.chat import Sample
from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.order import micro_batches, rows_of_step, share
from qtune.errors import UserError
from qtune.machine import available_bytes
from qtune.memory import Memory, training_memory
from qtune.model.load import add_adapter, make_ready
from qtune.model.quantizer import QtuneConfig, quantized_on_meta
from qtune.quant.linear import QuantLinear
from qtune.recipe import Recipe
from qtune.recompute_choice import Recompute, choose
from qtune.train import recompute
from qtune.train.recompute import POLICIES, Policy

# a training step takes this many times its matrix products: attention, norms, loss, dequantizing
# (measured with the quickstart on two AMX cores; the bar shows the true rate)
OVERHEAD = 1.4
# the largest micro-batch of a run is looked for in so many steps
MOST_STEPS = 1000


@dataclass(frozen=True)
class Layer:
    """A linear layer in the run: its matrix [O, I], how it is stored, and in how many bytes."""

    name: str
    shape: tuple[int, int]
    format: str
    size_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and need."""

    layers: list[Layer]
    num_parameters: int
    num_trained: int
    memory: Memory
    recompute: Recompute
    available_bytes: int
    steps: int
    tokens_per_step: int
    expected_minutes: float
    disk_bytes: int
    """What the run will write: checkpoints and exports."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plan.json holds it."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def make_plan(
    recipe: Recipe,
    folder: Path,
    samples: Sequence[Sample],
    device: torch.device,
    num_processes: int = 1,
    *,
    free_bytes: int | None = None,
    begun_with: Policy | None = None,
) -> Plan:
    """The plan of a run on the model in `folder` with these training samples.

    `free_bytes` is what the run may take, by default what is free on the device; `begun_with` is
    the policy of recomputation of a run that goes on. Raises UserError where the run needs more
    memory than there is, or settings fit no layer.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=recipe.trust_remote_code)
    base = meta_model(config, recipe)
    layers = [_layer(name, m) for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    num_parameters = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    model = add_adapter(base, recipe.lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = num_steps(recipe, len(samples))
    largest = _largest_micro_batch(recipe, samples, steps, num_processes)
    memories = _memories(model, largest, device, recipe)
    free = available_bytes(device) if free_bytes is None else free_bytes
    sizes = {policy: memory.total for policy, memory in memories.items()}
    chosen = choose(sizes, free, recipe.train.recompute, begun_with)
    memory = memories[chosen.policy]
    tokens = _tokens(samples) * recipe.train.batch_size // len(samples)
    seconds = _step_seconds(num_parameters, trained, tokens / num_processes, chosen.policy, device)
    plan = Plan(
        layers=layers,
        num_parameters=num_parameters,
        num_trained=trained,
        memory=memory,
        recompute=chosen,
        available_bytes=free,
        steps=steps,
        tokens_per_step=tokens,
        expected_minutes=steps * seconds / 60,
        disk_bytes=_disk_bytes(recipe, folder, memory),
    )
    _check_fits(plan)
    return plan


def meta_model(config: Any, recipe: Recipe) -> PreTrainedModel:
    """The base model of the run on the meta device, its layers as they will be stored."""
    model: PreTrainedModel
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16,
            trust_remote_code=recipe.trust_remote_code,
        )
    make_ready(model)
    if recipe.quant.format is not None:
        settings = QtuneConfig(
            format=recipe.quant.format,
            group_size=recipe.quant.group_size,
            skip=list(recipe.quant.skip),
        )
        quantized_on_meta(model, settings)
    model.requires_grad_(False)
    return model


def num_steps(recipe: Recipe, num_rows: int) -> int:
    """Optimizer steps of the run; raises UserError where all of them are warm-up."""
    settings = recipe.train
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    steps = max(1, round(settings.epochs * num_rows / settings.batch_size))
    if settings.warmup_steps >= steps:
        raise UserError(
            f"train.warmup_steps ({settings.warmup_steps}) must be less than the {steps} steps "
            f"that train.epochs ({settings.epochs}) takes with {num_rows} rows"
        )
    return steps


def _layer(name: str, layer: torch.nn.Linear) -> Layer:
    shape = (layer.out_features, layer.in_features)
    size = sum(parameter.nbytes for parameter in layer.parameters())
    if isinstance(layer, QuantLinear):
        return Layer(name, shape, layer.format_name, size)
    return Layer(name, shape, str(layer.weight.dtype).removeprefix("torch."), size)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.ids) for sample in samples)


def _largest_micro_batch(
    recipe: Recipe, samples: Sequence[Sample], steps: int, num_processes: int
) -> list[Sample]:
    """The micro-batch with the most tokens that the run meets, or its longest sample alone."""
    largest = [max(samples, key=lambda sample: len(sample.ids))]
    for step in range(min(steps, MOST_STEPS)):
        rows = rows_of_step(len(samples), recipe.train.batch_size, recipe.seed, step)
        own = share([samples[row] for row in rows], 0, num_processes)
        groups = micro_batches(own, recipe.train.micro_batch_tokens)
        largest = max(largest, *groups, key=_tokens)
    return largest


def _memories(
    model: torch.nn.Module, samples: Sequence[Sample], device: torch.device, recipe: Recipe
) -> dict[Policy, Memory]:
    """Bytes of a step under each policy that the model can follow, fastest first.

    Raises UserError where the recipe names one that it cannot.
    """
    batch = collate(samples, "meta", multiple=ROW_MULTIPLE)
    policies = POLICIES if any(recompute.blocks(model)) else POLICIES[:1]
    memories: dict[Policy, Memory] = {}
    for policy in policies:
        with suppress(recompute.ChangedInPlaceError):
            memories[policy] = training_memory(model, batch, device, policy)
    wanted = recipe.train.recompute
    if wanted != "auto" and wanted not in memories:
        raise UserError(
            f"train.recompute: {wanted} does not work with this model; set it to auto, or to "
            f"{' or '.join(memories)}"
        )
    return memories


def _step_seconds(
    frozen: int, trained: int, tokens: float, policy: Policy, device: torch.device
) -> float:
    """Seconds of a step: two products with a frozen weight per token, three with others."""
    products = 3 * frozen if policy == "all" else 2 * frozen
    return OVERHEAD * 2 * (products + 3 * trained) * tokens / _matrix_rate(device)


def _matrix_rate(device: torch.device) -> float:
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


def _disk_bytes(recipe: Recipe, folder: Path, memory: Memory) -> int:
    """Checkpoints, adapter, and the most that exports can be; both merges exist for a while."""
    checkpoints = (recipe.train.keep + 1) * (memory.adapter + memory.optimizer)
    base = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes = {"adapter": 0, "bf16": 2 * base}
    exports = sum(sizes.get(name, memory.weights) + memory.adapter for name in recipe.export)
    return checkpoints + memory.adapter + exports


def _check_fits(plan: Plan) -> None:
    """Raises UserError where the plan needs more than there is."""
    needed, there = plan.memory.total, plan.available_bytes
    if needed <= there:
        return
    largest = max(asdict(plan.memory).items(), key=lambda item: item[1])[0]
    raise UserError(
        f"not enough memory: the plan needs {needed / 2**30:.1f} GiB, {there / 2**30:.1f} GiB are "
        f"free; most goes to {largest}: try {_advice(largest, plan.recompute)}"
    )


def _advice(largest: str, recompute: Recompute) -> str:
    """What to set where most memory goes to that part."""
    shorter = "a smaller train.micro_batch_tokens"
    kept = shorter if recompute.saves_most else f"train.recompute: all or {shorter}"
    return {
        "activations": kept,
        "backward": shorter,
        "logits": shorter,
        "weights": "quant.format: nf4, or a smaller model",
    }.get(largest, "a smaller lora.rank")
