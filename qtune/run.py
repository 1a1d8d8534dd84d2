"""The main path: the stages of a run, in order.

    recipe -> setup -> plan -> trained adapter -> table -> exported folders -> report

What can fail is asked before anything is written. Each stage leaves its files in the run folder,
and those after training start from there, so each can be run again alone.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel

from qtune import run_folder, show, show_data
from qtune.environment import environment
from qtune.errors import UserError
from qtune.evaluate import suites
from qtune.export import exporter
from qtune.machine import Peak, available_bytes, keeping_freed_memory
from qtune.model.calibrated import keep_beside
from qtune.model.calibration.enough import shortage
from qtune.model.forward import check_packing
from qtune.model.served_codes import take_originals
from qtune.model.sharded import load_adapted
from qtune.plan import Plan, make_plan, plan_elsewhere
from qtune.progress import say
from qtune.quant.format import format_names
from qtune.recipe import Recipe
from qtune.recipe_changes import covers
from qtune.report import write_report
from qtune.results import Results
from qtune.run_folder import RunFolder
from qtune.sampling import answers_to_test_rows
from qtune.setup import Setup, open_setup, stored_base
from qtune.train import log, loop, optim, parallel, recompute, state
from qtune.train.keeper import check_adapter
from qtune.train.objective import Objective, load_objective
from qtune.train.tensors import whole_parameters


def train(recipe: Recipe, *, resume: bool = False, allow: Sequence[str] = ()) -> None:
    """Everything: train the recipe's model, measure it, merge, export, report.

    A resumed run may differ from how it began in the recipe's keys, or sections, named in `allow`.
    Raises UserError for what the user can mend; before training starts, with nothing written.
    """
    exporter.check(recipe, recipe.export)
    suites.check(recipe.evaluate)
    changed = run_folder.check(recipe, resume=resume, allow=allow)
    log.check_trackers(recipe)
    objective = load_objective(recipe.train)
    accelerator = parallel.open_accelerator()
    optim.check(recipe.train, accelerator.device)
    setup = open_setup(recipe, accelerator)
    exporter.check_model(recipe.export, setup.base, setup.tokenizer)
    run = RunFolder(recipe.run, recipe)
    plan = _plan(run, setup, accelerator)
    exporter.check_mixture(recipe, recipe.export, (layer.name for layer in plan.layers))
    run_folder.check_disk(recipe.run, plan.disk_bytes)
    show.plan(plan, setup)
    if changed or not run.adapter.is_dir():
        fit(run, setup, plan, objective, accelerator, other_data=covers(allow, "data.train"))
    if accelerator.is_main_process and _fits_whole(plan, setup):
        results = Results(run, setup)
        results.measure_bases()
        results.measure_cache()
        _finish(run, results, results.export(recipe.export))


def _fits_whole(plan: Plan, setup: Setup) -> bool:
    """Whether one device can hold the model that was trained on several; it is said if not."""
    size, free = sum(layer.size_bytes for layer in plan.layers), available_bytes(setup.device)
    if plan.num_processes > 1 and size > free:
        say(
            f"trained: the adapter is in {setup.recipe.run}. One device cannot hold the whole "
            f"model ({size / 2**30:.0f} GiB); `qtune eval` and `qtune export` measure and write it "
            "where one can"
        )
        return False
    return True


def fit(
    run: RunFolder,
    setup: Setup,
    plan: Plan,
    objective: Objective,
    accelerator: Accelerator,
    *,
    other_data: bool = False,
) -> None:
    """Train the adapter from the last checkpoint, or from the start, and write it to `adapter/`."""
    recipe, feed = run.recipe, setup.data.feed
    fresh = state.fresh(feed, accelerator.num_processes)
    start = state.resumed(run.checkpoints, fresh, other_data=other_data)
    peak = Peak(setup.device)
    base = stored_base(setup, run, builds=accelerator.is_local_main_process)
    model = _model(base, setup, accelerator)
    check_adapter(run.checkpoints, start, model)
    recompute.use(model, plan.recompute.policy)
    # from here on nothing that is wrong with model or data is left to find
    if accelerator.is_main_process:
        run_folder.create(recipe)
        run.write("plan.json", plan.to_json())
        run.write("data.json", setup.data.summary)
        run.write("environment.json", environment(setup.device))
        keep_beside(base, run.path / run_folder.CALIBRATION, run.start)
    log.start_trackers(recipe, run.path, accelerator, start.step)
    job = loop.Job(
        recipe=recipe,
        model=model,
        objective=objective,
        feed=feed,
        held_out=setup.data.held_out[: recipe.evaluate.loss_rows],
        num_steps=plan.steps,
        folder=run.path,
        start=start,
        peak=peak,
        matrix_flops_per_s=plan.matrix_flops_per_s,
        answer=answers_to_test_rows(setup),
    )
    with keeping_freed_memory():
        loop.train(job, accelerator)
    tensors = whole_parameters(model)
    if accelerator.is_main_process:
        exporter.write_run_adapter(
            model, run.adapter, recipe.model, recipe.revision, tensors, setup.tokenizer
        )
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
        setup.data.feed,
        setup.device,
        accelerator.num_processes,
        free_bytes=int(accelerator.gather(free).min()),
        begun_with=before and before["recompute"]["policy"],
    )


def _model(base: Path, setup: Setup, accelerator: Accelerator) -> PeftModel:
    """The quantized base with an adapter at its start, the same one in every process."""
    recipe = setup.recipe
    set_seed(recipe.seed)
    model = load_adapted(base, recipe, accelerator)
    take_originals(model, setup.base)
    check_packing(model)
    parallel.settle(model)
    return model


def check(recipe: Recipe, memory: str | None = None, num_processes: int = 1) -> None:
    """Show what `train` would do: the plan, the data, a few samples with what is learned marked.

    With `memory`, such as 24GiB, the plan is for GPUs with so much of it, which need not be here,
    and of the model no weights are needed.
    """
    exporter.check(recipe, recipe.export)
    suites.check(recipe.evaluate)
    log.check_trackers(recipe)
    load_objective(recipe.train)
    accelerator = parallel.open_accelerator()
    if memory is None:
        optim.check(recipe.train, accelerator.device)
    setup = open_setup(recipe, accelerator, weights=memory is None)
    exporter.check_model(recipe.export, setup.base, setup.tokenizer)
    feed = setup.data.feed
    if memory is None:
        plan = make_plan(recipe, setup.base, feed, setup.device, num_processes)
    else:
        plan = plan_elsewhere(recipe, setup.base, feed, memory, num_processes)
    exporter.check_mixture(recipe, recipe.export, (layer.name for layer in plan.layers))
    show.plan(plan, setup)
    show_data.data(setup)
    _warn_of_little_text(plan, setup)


def _warn_of_little_text(plan: Plan, setup: Setup) -> None:
    """Say so where the base is to be calibrated on less text than its layers need."""
    stored = format_names()
    widest = max((layer.shape[1] for layer in plan.layers if layer.format in stored), default=0)
    words = None if setup.text is None else shortage(setup.text.num_tokens, widest)
    if words is not None:
        say(words)


def evaluate(run: RunFolder) -> None:
    """Measure the run's base, quantized and tuned model again, and write its report."""
    run.check_trained()
    suites.check(run.recipe.evaluate)
    results = Results(run, open_setup(run.recipe, parallel.open_accelerator()))
    results.measure_bases()
    results.measure_cache()
    _finish(run, results)


def export(run: RunFolder, names: Sequence[str], *, force: bool = False) -> None:
    """Write and measure exports of the run, and write its report.

    Raises UserError for a merge that keeps too little of the tuning, unless `force`.
    """
    run.check_trained()
    exporter.check(run.recipe, names)
    suites.check(run.recipe.evaluate)
    setup = open_setup(run.recipe, parallel.open_accelerator())
    exporter.check_model(names, setup.base, setup.tokenizer)
    results = Results(run, setup)
    _finish(run, results, results.export(names, force=force))


def _finish(run: RunFolder, results: Results, refused: Sequence[str] = ()) -> None:
    """Report and show the results; UserError for what was refused, which is not written."""
    report(run)
    show.results(results.table, run)
    if refused:
        raise UserError("\n".join(refused))


def report(run: RunFolder) -> None:
    """Write the run's report.html."""
    say(f"report: {write_report(run)}")
