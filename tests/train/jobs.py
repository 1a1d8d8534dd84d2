"""Training jobs for tests: on a tiny model, small enough to be run again and again.

As a program, `python jobs.py RECIPE` trains the recipe's job with a float32 model: what several
ranks do to a loss is not to be told from bf16's rounding.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from warm import run_ranks

from qtune import recipe_yaml
from qtune.machine import Peak
from qtune.model.load import add_adapter, load_base
from qtune.plan import num_steps
from qtune.recipe import Recipe
from qtune.setup import open_setup
from qtune.train import loop, parallel, state
from qtune.train.log import MEASURED, read_metrics
from qtune.train.objective import load_objective

CPU = torch.device("cpu")


class StopsAfter(Peak):
    """Interrupts a training behind its n-th step, before that is logged."""

    def __init__(self, steps: int) -> None:
        super().__init__(CPU)
        self.left = steps

    def bytes(self) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().bytes()


def make_job(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    peak: Peak | None = None,
    **options: Any,
) -> loop.Job:
    """A job as `run` makes it, without plan and report."""
    accelerator = accelerator or Accelerator()
    setup = open_setup(recipe, accelerator)
    torch.manual_seed(recipe.seed)
    base = load_base(setup.base, recipe.quant, device=CPU, dtype=dtype)
    recipe.run.mkdir(exist_ok=True, parents=True)
    feed = setup.data.feed
    fresh = state.fresh(feed, accelerator.num_processes)
    return loop.Job(
        recipe=recipe,
        model=add_adapter(base, recipe.lora),
        objective=load_objective(recipe.train),
        feed=feed,
        held_out=setup.data.held_out,
        num_steps=num_steps(recipe, feed.num_rows),
        folder=recipe.run,
        start=state.resumed(recipe.run / "checkpoints", fresh),
        peak=peak or Peak(CPU),
        **options,
    )


def shaken(job: loop.Job) -> loop.Job:
    """The job with an adapter that does something: as it starts, B is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return job


def figures(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, clock and memory aside."""
    return [{k: v for k, v in m.items() if k not in MEASURED} for m in read_metrics(folder)]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained in the model."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all tensors are equal in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_in_ranks(recipe: Recipe, num_processes: int) -> list[dict[str, Any]]:
    """Train the recipe's float32 job in processes of its own; what metrics.jsonl says."""
    file = recipe.run.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe_yaml.dump(recipe))
    run_ranks(Path(__file__), file, num_processes=num_processes)
    return figures(recipe.run)


def main() -> None:
    """Train the recipe on the command line in as many processes as were started."""
    accelerator = parallel.open_accelerator()
    job = make_job(recipe_yaml.load(Path(sys.argv[1])), accelerator, dtype=torch.float32)
    loop.train(shaken(job), accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
