"""What the terminal shows of a run: the plan, the results and what to do next.

The data itself, with samples, is shown by `show_data.py`.
"""

from collections import Counter
from typing import Any

from rich.markup import escape
from rich.text import Text

from qtune.evaluate.compare import Table, print_table
from qtune.plan import Plan
from qtune.progress import console
from qtune.recipe import Recipe, Train
from qtune.run_folder import RunFolder
from qtune.setup import Setup
from qtune.show_data import notes
from qtune.train.objective import preference_settings

# settings of the optimizer that are told where they are set
_OPTIONAL = ("lora_plus_ratio", "weight_decay", "neftune_alpha", "ema_decay", "spike_factor")


def plan(plan: Plan, setup: Setup) -> None:
    """Print what the run will do and need, and what looks odd in its data."""
    recipe = setup.recipe
    lines = {
        "model": f"{recipe.model}, {plan.num_parameters / 1e6:.0f} M weights in linear layers",
        "layers": ", ".join(f"{count} in {name}" for name, count in _formats(plan).items()),
        "adapter": f"{_adapter(recipe)}, {plan.num_trained / 1e6:.1f} M trained weights",
        "data": _data(setup),
        "mix": _mix(setup.data.summary["sources"]),
        "objective": objective(recipe.train),
        "training": _training(plan, setup),
        "packing": _packing(recipe),
        "optimizer": _optimizer(recipe),
        "memory": _memory(plan),
        "recompute": f"{plan.recompute.policy}: {plan.recompute.reason} ("
        + ", ".join(f"{name} {_gib(size)}" for name, size in plan.recompute.total_bytes.items())
        + ")",
        "disk": f"{_gib(plan.disk_bytes)} in {recipe.run}",
        "time": "unknown: the devices are not here"
        if plan.expected_minutes is None
        else f"about {max(1, round(plan.expected_minutes))} min of training",
        "exports": ", ".join(recipe.export) or "none",
    }
    for name, text in lines.items():
        if text:
            console.print(f"[bold]{name:<9}[/] {escape(text)}", soft_wrap=True)
    notes(setup)


def results(table: Table, run: RunFolder) -> None:
    """Print the table of a run and the commands that go on from it."""
    print_table(console, table)
    console.print("\nnext:")
    for command in (
        f"qtune chat {run.path}",
        f"qtune export {run.path} --to bf16",
        f"qtune eval {run.path}",
    ):
        console.print(Text(f"  {command}", style="bold"), soft_wrap=True)


def objective(settings: Train) -> str:
    """The objective, with the settings of its own."""
    own = preference_settings(settings)
    # where the recipe gives no strength, the objective has one
    values = ((n, settings.beta if n == "beta" else getattr(settings.preference, n)) for n in own)
    return ", ".join([settings.objective, *(f"{name} {value:g}" for name, value in values)])


def _adapter(recipe: Recipe) -> str:
    """What is trained beside, or in the place of, plain LoRA, and the rank where there is one."""
    rank = f"rank {recipe.lora.rank}"
    if recipe.train.merge_aware:
        return f"{rank}, into the codes after {recipe.train.merge_aware_from:.0%} of the steps"
    if recipe.adapter == "lora":
        return rank
    lr = f"scales{' and zero points' if recipe.scales.zeros else ''} at {recipe.scales.lr:g}"
    named = {"scales": lr, "lora + scales": f"{rank}, {lr}", "qa-lora": f"qa-lora of {rank}"}
    return named[recipe.adapter]


def _formats(plan: Plan) -> Counter[str]:
    return Counter(layer.format for layer in plan.layers)


def _data(setup: Setup) -> str:
    found, held_out = setup.data.summary["train"], setup.data.summary["held_out"]
    words = (
        f"{found['rows']} training rows of {found['length_p50']:.0f} tokens (median), "
        f"{found['supervised_share']:.0%} supervised"
    )
    if setup.recipe.data.streaming:
        words = f"a stream; its first {words}"
    return f"{words}; {held_out['rows']} held out, {len(setup.data.test)} test requests"


def _mix(sources: list[dict[str, Any]]) -> str:
    """The sources with their shares of an epoch; nothing where there is only one."""
    if len(sources) == 1:
        return ""
    return ", ".join(f"{part['share']:.0%} {part['path']}" for part in sources)


def _training(plan: Plan, setup: Setup) -> str:
    words = (
        f"{plan.steps} steps of {setup.recipe.train.batch_size} samples, "
        f"about {plan.tokens_per_step} tokens each, on "
    )
    if plan.num_processes == 1:
        return words + str(setup.device)
    return words + f"{plan.num_processes} devices ({setup.recipe.train.parallel})"


def _packing(recipe: Recipe) -> str:
    most = f"at most {recipe.train.micro_batch_tokens} tokens"
    if recipe.data.packing:
        return f"samples end to end in rows of {most}, where the model can keep them apart"
    return f"off: one sample per row, {most} with padding"


def _optimizer(recipe: Recipe) -> str:
    settings = recipe.train
    warmup = f" after {settings.warmup_steps} of warm-up" if settings.warmup_steps else ""
    words = [settings.optimizer, f"learning rate {settings.lr:g} ({settings.schedule}{warmup})"]
    defaults = type(settings).__dataclass_fields__
    for name in _OPTIONAL:
        value = getattr(settings, name)
        if value != defaults[name].default:
            words.append(f"{name} {value:g}")
    return ", ".join(words)


def _memory(plan: Plan) -> str:
    memory = plan.memory
    each = "" if plan.num_processes == 1 else " on each device"
    return (
        f"{_gib(memory.total)}{each}: weights {_gib(memory.weights)}, adapter with gradients "
        f"and optimizer {_gib(memory.adapter + memory.gradients + memory.optimizer)}, activations "
        f"{_gib(memory.activations)}, backward pass {_gib(memory.backward)}, logits "
        f"{_gib(memory.logits)}; {_gib(plan.available_bytes)} are free"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
