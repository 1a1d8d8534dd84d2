"""The main path: the stages of a run, in order.

    recipe -> setup -> plan -> trained adapter -> table -> exported folders -> report

What can fail is asked before anything is written. Each stage leaves its files in the run folder, and those after
training start from there, so each can be run again alone.
"""

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import set_seed

from qtune import run_folder, show
from qtune.environment import environment
from qtune.export import exporter
from qtune.export.adapter import write_adapter
from qtune.memory import Peak
from qtune.model.load import add_adapter, load_base
from qtune.plan import make_plan
from qtune.progress import console
from qtune.recipe import Recipe
from qtune.report import write_report
from qtune.results import Results
from qtune.run_folder import RunFolder
from qtune.setup import Setup, open_setup
from qtune.train import loop, state


def train(recipe: Recipe, *, resume: bool = False) -> None:
    """Everything: train the recipe's model, measure it, merge, export, report.

    Raises UserError for what the user can mend; before training starts, with nothing written.
    """
    exporter.check(recipe, recipe.export, recipe.merge.quantized)
    earlier = run_folder.reopen(recipe) if resume else None
    if earlier is None:
        run_folder.check_free(recipe.run)
    accelerator = Accelerator(log_with=["wandb"] if recipe.log.wandb else [])
    setup = open_setup(recipe, accelerator)
    plan = make_plan(recipe, setup.base, setup.data.train, setup.device)
    run_folder.check_disk(recipe.run, plan.disk_bytes)
    show.plan(plan, setup)
    run = earlier or run_folder.create(recipe)
    if accelerator.is_main_process:
        run.write("plan.json", plan.to_json())
        run.write("environment.json", environment(setup.device))
    fit(run, setup, plan.steps, accelerator)
    if accelerator.is_main_process:
        results = Results(run, setup)
        results.measure_bases()
        results.export(recipe.export)
        report(run)
        show.results(results.table, run)


def fit(run: RunFolder, setup: Setup, num_steps: int, accelerator: Accelerator) -> None:
    """Train the adapter from the last checkpoint, or from the start, and write it to `adapter/`."""
    recipe = run.recipe
    set_seed(recipe.seed)
    if recipe.log.wandb:
        accelerator.init_trackers(recipe.log.wandb, init_kwargs={"wandb": {"dir": str(run.path)}})
    peak = Peak(setup.device)
    base = load_base(
        setup.base,
        recipe.quant,
        device=setup.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    model = add_adapter(base, recipe.lora)
    if recipe.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    start = state.fresh(setup.data.train, accelerator.num_processes)
    job = loop.Job(
        recipe=recipe,
        model=model,
        samples=setup.data.train,
        held_out=setup.data.held_out[: recipe.evaluate.loss_rows],
        num_steps=num_steps,
        folder=run.path,
        start=state.resumed(run.checkpoints, start),
        peak=peak,
    )
    loop.train(job, accelerator)
    if accelerator.is_main_process:
        partial = run.path / ".adapter.partial"
        partial.mkdir(exist_ok=True)
        write_adapter(model, partial, recipe.model, recipe.revision)
        partial.rename(run.adapter)
    accelerator.end_training()


def check(recipe: Recipe) -> None:
    """Show what `train` would do: the plan, the data, a few samples with what is learned marked."""
    exporter.check(recipe, recipe.export, recipe.merge.quantized)
    setup = open_setup(recipe, Accelerator())
    plan = make_plan(recipe, setup.base, setup.data.train, setup.device)
    show.plan(plan, setup)
    show.samples(setup)


def evaluate(run: RunFolder) -> None:
    """Measure the run's base, quantized and tuned model again, and write its report."""
    results = Results(run, open_setup(run.recipe, Accelerator()))
    results.measure_bases()
    report(run)
    show.results(results.table, run)


def export(run: RunFolder, names: Sequence[str]) -> None:
    """Write and measure exports of the run, and write its report."""
    exporter.check(run.recipe, tuple(names), run.recipe.merge.quantized)
    results = Results(run, open_setup(run.recipe, Accelerator()))
    results.export(names)
    report(run)
    show.results(results.table, run)


def report(run: RunFolder) -> None:
    """Write the run's report.html."""
    console.print(f"report: {write_report(run)}")
