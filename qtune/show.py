"""What the terminal shows of a run: the plan, samples, the results and what to do next."""

from collections import Counter
from itertools import groupby
from operator import itemgetter

from rich.markup import escape
from rich.text import Text

from qtune.data.chat import Sample
from qtune.data.lint import summary
from qtune.evaluate.compare import Table, print_table
from qtune.plan import Plan
from qtune.progress import console
from qtune.run_folder import RunFolder
from qtune.setup import Setup

NUM_SAMPLES = 3


def plan(plan: Plan, setup: Setup) -> None:
    """Print what the run will do and need."""
    recipe = setup.recipe
    formats = Counter(layer.format for layer in plan.layers)
    data, held_out = summary(setup.data.train), setup.data.held_out
    memory = plan.memory
    lines = {
        "model": f"{recipe.model}, {plan.num_parameters / 1e6:.0f} M weights in linear layers",
        "layers": ", ".join(f"{count} in {name}" for name, count in formats.items()),
        "adapter": f"rank {recipe.lora.rank}, {plan.num_trained / 1e6:.1f} M trained weights",
        "data": f"{data['rows']} training rows of {data['length_p50']:.0f} tokens (median), "
        f"{data['supervised_share']:.0%} supervised; {len(held_out)} held out, "
        f"{len(setup.data.test)} test requests",
        "training": f"{plan.steps} steps of {recipe.train.batch_size} samples, "
        f"about {plan.tokens_per_step} tokens each, on {setup.device}",
        "memory": f"{_gib(memory.total)}: weights {_gib(memory.weights)}, adapter with gradients "
        f"and optimizer {_gib(memory.adapter + memory.gradients + memory.optimizer)}, activations "
        f"{_gib(memory.activations)}, backward pass {_gib(memory.backward)}, logits "
        f"{_gib(memory.logits)}; "
        f"{_gib(plan.available_bytes)} are free",
        "recompute": f"{plan.recompute.policy}: {plan.recompute.reason} ("
        + ", ".join(f"{name} {_gib(size)}" for name, size in plan.recompute.total_bytes.items())
        + ")",
        "disk": f"{_gib(plan.disk_bytes)} in {recipe.run}",
        "time": f"about {max(1, round(plan.expected_minutes))} min of training",
        "exports": ", ".join(recipe.export) or "none",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:<9}[/] {escape(text)}", soft_wrap=True)


def samples(setup: Setup) -> None:
    """Print a few training samples; what is learned stands between ‹ and ›, green on a terminal."""
    for sample in setup.data.train[:NUM_SAMPLES]:
        console.rule(Text(sample.row.place))
        console.print(_marked(sample, setup), soft_wrap=True)


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


def _marked(sample: Sample, setup: Setup) -> Text:
    """The sample's text with its supervised stretches marked."""
    text = Text()
    pairs = zip(sample.ids, sample.supervised, strict=True)
    for supervised, stretch in groupby(pairs, key=itemgetter(1)):
        words = str(setup.tokenizer.decode([token for token, _ in stretch]))
        text.append(f"‹{words}›" if supervised else words, style="green" if supervised else "dim")
    return text


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
