"""The main path: the stages of a run, in order.

    recipe -> setup -> plan -> trained adapter -> table -> exported folders -> report

What can fail is asked before anything is written. Each stage leaves its files in the run folder,
and those after training start from there, so each can be run again alone.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel

from qtune import run_folder, show
from qtune.environment import environment
from qtune.export import exporter
from qtune.machine import Peak, available_bytes, keeping_freed_memory
from qtune.model.forward import check_packing
from qtune.model.load import add_adapter, load_base
from qtune.plan import Plan, make_plan
from qtune.progress import console
from qtune.recipe import Recipe
from qtune.report import write_report
from qtune.results import Results
from qtune.run_folder import RunFolder
from qtune.setup import Setup, open_setup
from qtune.train import log, loop, recompute, state


def train(recipe: Recipe, *, resume: bool = False) -> None:
    """Everything: train the recipe's model, measure it, merge, export, report.

    Raises UserError for what the user can mend; before training starts, with nothing written.
    """
    exporter.check(recipe, recipe.export, recipe.merge.quantized)
    run_folder.check(recipe, resume=resume)
    log.check_wandb(recipe)
    accelerator = Accelerator(log_with="wandb" if recipe.log.wandb else None)
    setup = open_setup(recipe, accelerator)
    run = RunFolder(recipe.run, recipe)
    plan = _plan(run, setup, accelerator)
    run_folder.check_disk(recipe.run, plan.disk_bytes)
    show.plan(plan, setup)
    if not run.adapter.is_dir():
        fit(run, setup, plan, accelerator)
    if accelerator.is_main_process:
        results = Results(run, setup)
        results.measure_bases()
        results.export(recipe.export)
        report(run)
        show.results(results.table, run)


def fit(run: RunFolder, setup: Setup, plan: Plan, accelerator: Accelerator) -> None:
    """Train the adapter from the last checkpoint, or from the start, and write it to `adapter/`."""
    recipe = run.recipe
    fresh = state.fresh(setup.data.train, accelerator.num_processes)
    start = state.resumed(run.checkpoints, fresh)
    peak = Peak(setup.device)
    model = _model(setup)
    recompute.use(model, plan.recompute.policy)
    # from here on nothing that is wrong with model or data is left to find
    if accelerator.is_main_process:
        run_folder.create(recipe)
        run.write("plan.json", plan.to_json())
        run.write("environment.json", environment(setup.device))
    log.start_wandb(recipe, run.path, accelerator)
    job = loop.Job(
        recipe=recipe,
        model=model,
        samples=setup.data.train,
        held_out=setup.data.held_out[: recipe.evaluate.loss_rows],
        num_steps=plan.steps,
        folder=run.path,
        start=start,
        peak=peak,
    )
    with keeping_freed_memory():
        loop.train(job, accelerator)
    if accelerator.is_main_process:
        exporter.write_run_adapter(model, run.adapter, recipe.model, recipe.revision)
    accelerator.end_training()
    # it would keep the model in memory while others are measured
    accelerator.free_memory()


def _plan(run: RunFolder, setup: Setup, accelerator: Accelerator) -> Plan:
    """The plan of the run, the same in every process; a run that goes on does so as it began."""
    free = torch.tensor([available_bytes(setup.device)], device=setup.device)
    before = run.read("plan.json")
    return make_plan(
        run.recipe,
        setup.base,
        setup.data.train,
        setup.device,
        accelerator.num_processes,
        free_bytes=int(accelerator.gather(free).min()),
        begun_with=before and before["recompute"]["policy"],
    )


def _model(setup: Setup) -> PeftModel:
    """The quantized base with a fresh adapter, the same one in every process."""
    recipe = setup.recipe
    set_seed(recipe.seed)
    base = load_base(
        setup.base,
        recipe.quant,
        device=setup.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    check_packing(base)
    return add_adapter(base, recipe.lora)


def check(recipe: Recipe) -> None:
    """Show what `train` would do: the plan, the data, a few samples with what is learned marked."""
    exporter.check(recipe, recipe.export, recipe.merge.quantized)
    setup = open_setup(recipe, Accelerator())
    plan = make_plan(recipe, setup.base, setup.data.train, setup.device)
    show.plan(plan, setup)
    show.samples(setup)


def evaluate(run: RunFolder) -> None:
    """Measure the run's base, quantized and tuned model again, and write its report."""
    run.check_trained()
    results = Results(run, open_setup(run.recipe, Accelerator()))
    results.measure_bases()
    report(run)
    show.results(results.table, run)


def export(run: RunFolder, names: Sequence[str]) -> None:
    """Write and measure exports of the run, and write its report."""
    run.check_trained()
    exporter.check(run.recipe, tuple(names), run.recipe.merge.quantized)
    results = Results(run, open_setup(run.recipe, Accelerator()))
    results.export(names)
    report(run)
    show.results(results.table, run)


def report(run: RunFolder) -> None:
    """Write the run's report.html."""
    console.print(f"report: {write_report(run)}", markup=False, soft_wrap=True)
