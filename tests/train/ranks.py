"""What the processes of test_parallel.py do: python ranks.py CASES.json; writes RESULTS beside it.

Each case trains a tiny model for some steps and says what it saw; run by torchrun, in two processes
together, or called by the test itself, in one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from qtune.data.sample import Sample
from qtune.model.load import add_adapter, load_base
from qtune.model.sharded import load_sharded
from qtune.recipe import Data, Lora, Recipe, Train
from qtune.train import parallel, recompute
from qtune.train.objective import load_objective
from qtune.train.optim import make_optimizer
from qtune.train.optimizer_state import optimizer_tensors, restore_optimizer
from qtune.train.step import Passes
from qtune.train.tensors import put_parameters, trained_parameters, whole_parameters

# unlike lengths, so that ranks have unlike numbers of micro-batches
LENGTHS = (60, 9, 33, 21, 50, 14, 40, 28)


def samples(step: int, objective: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(step)

    def sample(length: int, rejected: Sample | None = None) -> Sample:
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        return Sample("here", ids, [0] * 4 + [1] * (length - 4), rejected=rejected)

    pairs = objective == "dpo"
    return [sample(length, sample(length // 2 + 5) if pairs else None) for length in LENGTHS]


def run(case: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Losses, norms and a held-out loss of a few steps; how much of the model this process held."""
    objective, how = case.get("objective", "sft"), case["how"]
    settings = {"objective": objective, "micro_batch_tokens": 80, "max_grad_norm": 0.5}
    recipe = Recipe(
        model=case["model"],
        data=Data(train="demo:train"),
        lora=Lora(rank=4, alpha=8, modules_to_save=tuple(case.get("trained", ()))),
        train=Train(steps=9, parallel=how, **settings),
        run=Path("unused"),
    )
    model = load(recipe, case, accelerator)
    recompute.use(model, case.get("recompute", "none"))
    net = parallel.distribute(model, accelerator, how).train()
    optimizer = make_optimizer(model, recipe.train)
    passes = Passes(model, net, load_objective(recipe.train), recipe, accelerator)
    if "resume" in case:
        put_parameters(model, load_file(case["resume"] + ".adapter"))
        restore_optimizer(model, optimizer, load_file(case["resume"] + ".optimizer"))
    losses, norms = [], []
    for step in range(*case["steps"]):
        losses.append(passes.learn(samples(step, objective), tuple).loss)
        norms.append(parallel.clip_grad_norm(trained_parameters(model).values(), 0.5))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
    held_out = passes.measure(samples(100, objective)).loss
    after, moments = whole_parameters(model), optimizer_tensors(model, optimizer)
    if "save" in case and accelerator.is_main_process:
        save_file(after, case["save"] + ".adapter")
        save_file(moments, case["save"] + ".optimizer")
    size = sum(float(tensor.double().square().sum()) for tensor in after.values())
    return {"losses": losses, "norms": norms, "held_out": held_out, "size": size} | held(model)


def load(recipe: Recipe, case: dict[str, Any], accelerator: Accelerator) -> Any:
    folder = Path(recipe.model)
    if case.get("sliced"):
        return load_sharded(folder, recipe, accelerator)
    torch.manual_seed(recipe.seed)
    base = load_base(folder, recipe.quant, device=accelerator.device)
    return add_adapter(base, recipe.lora)


def held(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the parameters, and of the parts of them that this process held."""
    parameters = list(model.parameters())
    own = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
    return {"bytes": sum(p.nbytes for p in parameters), "own_bytes": sum(p.nbytes for p in own)}


def main() -> None:
    """Run the cases and let the first process write what it saw."""
    cases = Path(sys.argv[1])
    accelerator = parallel.open_accelerator()
    assert accelerator.num_processes == 2
    found = [run(case, accelerator) for case in json.loads(cases.read_text())]
    if accelerator.is_main_process:
        cases.with_suffix(".results").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
