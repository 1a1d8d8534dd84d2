"""What is left of a tuning in the low-bit checkpoint that is served: the table of docs/merge.md.

    python benchmarks/merge_aware.py --data gsm8k-train.jsonl --text wikitext2-valid.txt

On each base the same rows are learned in as many steps by each way to train; what is measured is
the model as it would be served: the adapter beside the codes, merged and quantized again, or in the
codes already. `--text` is what calibrated bases, and calibrated merges, see. Recovery is the share
of what plain LoRA gains, base and adapter apart, that a form keeps; changes of the loss are taken
sample by sample. Writes docs/merge.json and the table of docs/merge.md after each row.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from text_parts import text_parts
from torch import nn

from qtune import run
from qtune.data.calibration import calibration_text
from qtune.data.collate import ROW_MULTIPLE, Batch, collate
from qtune.data.order import micro_batches
from qtune.evaluate.paired import difference
from qtune.evaluate.perplexity import KEPT_TOKENS, Likelihood, held_out
from qtune.export.folder.trained import Trained
from qtune.export.requantized import requantized
from qtune.files import write_text
from qtune.model.adapt import load_trained
from qtune.model.load import load_base
from qtune.plan import make_plan
from qtune.recipe import Calibration, Data, Evaluate, Lora, Quant, Recipe, Scales, Train
from qtune.recipe_data import Source
from qtune.run_folder import RunFolder
from qtune.setup import Setup, open_setup, stored_base
from qtune.train.objective import load_objective

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/merge.md", ROOT / "docs/merge.json"
MARKS = "<!-- table -->\n", "<!-- end of table -->"
CONTEXT, HELD_OUT_ROWS = 192, 24
BASES: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "int4": {"format": "int4"},
    "int3": {"format": "int3", "method": "gptq", "rotate": True},
    "int2": {"format": "int2", "method": "gptq", "rotate": True},
}
# ways to train: what differs from plain LoRA in the recipe, and in its section train
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "merge-aware": ({}, {"merge_aware": True}),
    "merge-aware, random places": ({}, {"merge_aware": True, "merge_aware_originals": False}),
    "QA-LoRA": ({"adapter": "qa-lora"}, {}),
    "trained scales": ({"adapter": "scales"}, {}),
}
UNTUNED, BESIDE = "untuned", "LoRA beside the codes"
# rows of one base by name, with what was measured
Rows = dict[str, dict[str, Any]]


def main() -> None:
    """Measure the bases that are wanted, and write all that has been measured."""
    options = _options()
    for base in options.bases:
        rows: Rows = {}
        reference: Likelihood | None = None
        for name, found in _measured(base, options):
            reference = reference or (found if name == BESIDE else None)
            rows[name] = _row(found, reference)
            _write(base, rows)


def _measured(base: str, options: argparse.Namespace) -> Iterator[tuple[str, Likelihood]]:
    """Each row's name and what was measured of it, the reference first."""
    kept = None
    for way in options.ways:
        setup, folder = _trained(_recipe(base, way, options))
        batches = _batches(setup)
        for name, model in _forms(way, setup, folder, options.merges):
            number = KEPT_TOKENS if kept is None else 0
            found = held_out(model, batches, reference=kept, keep_tokens=number)
            kept = kept or found.kept
            yield name, found


def _recipe(base: str, way: str, options: argparse.Namespace) -> Recipe:
    calibration = Calibration(text=text_parts(options.text, options.folder).train, tokens=12288)
    columns = {"prompt": "question", "completion": "answer"}
    changes, training = WAYS[way]
    train = Train(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=1e-3,
        warmup_steps=2,
        betas=(0.9, 0.99),
        eval_every=0,
        save_every=0,
    )
    return Recipe(
        model=options.model,
        data=Data(
            train=Source(path=str(options.data), columns=columns),
            validation=0.01,
            max_length=CONTEXT,
            overlong="drop",
        ),
        quant=Quant(**BASES[base], calibration=calibration),
        lora=Lora(rank=16, alpha=32),
        scales=Scales(lr=1e-4),
        train=replace(train, **training),
        evaluate=Evaluate(loss_rows=HELD_OUT_ROWS, answer_rows=0),
        run=options.folder / base / way.replace(", ", "-").replace(" ", "-"),
        seed=options.seed,
        **changes,
    )


def _trained(recipe: Recipe) -> tuple[Setup, RunFolder]:
    """The opened recipe, and the folder of its run, which is trained where it has not been."""
    accelerator = Accelerator()
    setup, folder = open_setup(recipe, accelerator), RunFolder(recipe.run, recipe)
    if not folder.adapter.is_dir():
        plan = make_plan(recipe, setup.base, setup.data.feed, setup.device)
        run.fit(folder, setup, plan, load_objective(recipe.train), accelerator)
    return setup, folder


def _batches(setup: Setup) -> list[Batch]:
    samples = setup.data.held_out[:HELD_OUT_ROWS]
    groups = micro_batches(samples, setup.recipe.train.micro_batch_tokens, packing=False)
    return [collate(g, setup.device, multiple=ROW_MULTIPLE, packing=True) for g in groups]


def _forms(
    way: str, setup: Setup, folder: RunFolder, merges: list[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The forms in which a trained model is served, by the names of their rows."""
    recipe = setup.recipe
    base = load_base(stored_base(setup, folder), recipe.quant, device=setup.device)
    model = load_trained(base, folder.adapter)
    if way != "LoRA":
        yield way, model
        return
    yield BESIDE, model
    with model.disable_adapter():
        yield UNTUNED, model

    def text() -> Any:
        return calibration_text(recipe.quant.calibration, setup.data.feed.samples, setup.tokenizer)

    trained = Trained(recipe, model, setup.tokenizer, setup.base, form="merged", text=text)
    for method in merges:
        rotate = recipe.quant.rotate and method == "gptq"
        quant = replace(recipe.quant, method=method, rotate=rotate)
        with requantized(trained, quant, folder.path) as merged:
            yield f"LoRA, merged, then {method}", merged.model


def _row(found: Likelihood, reference: Likelihood | None) -> dict[str, Any]:
    row: dict[str, Any] = {"loss": found.loss, "tokens": found.tokens}
    if reference is None or found is reference:
        return row
    change = difference(found.samples, reference.samples)
    own = {"change": change.nats, "standard_error": change.standard_error}
    return row | own | {"kl": found.kl, "top1": found.top1}


def _write(base: str, rows: Rows) -> None:
    before: dict[str, Rows] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    found = before | {base: rows}
    write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    write_text(PAGE, page(PAGE.read_text("utf-8"), found))


def page(text: str, found: dict[str, Rows]) -> str:
    """The text of docs/merge.md with the table of these rows by base."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}{markdown(found)}{MARKS[1]}{after}"


def markdown(found: dict[str, Rows]) -> str:
    """The table."""
    lines = [
        "| Base | Served as | Held-out loss | Change | Recovery | KL | Top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, rows in found.items():
        for name, row in rows.items():
            share = f"{_recovery(row, rows):.3f}" if UNTUNED in rows else ""
            cells = [f"{row['loss']:.4f}", "", share, "", ""]
            if "change" in row:
                cells[1] = f"{row['change']:+.4f} ± {row['standard_error']:.4f}"
                cells[3:] = f"{row['kl']:.4f}", f"{row['top1']:.1%}"
            lines.append(f"| {base} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _recovery(row: dict[str, Any], rows: Rows) -> float:
    """The share of plain LoRA's gain that a row has."""
    untuned, tuned = rows[UNTUNED]["loss"], rows[BESIDE]["loss"]
    return float((untuned - row["loss"]) / (untuned - tuned))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's training rows")
    parser.add_argument("--text", type=Path, required=True, help="a text file to calibrate on")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, default=Path("runs/merge"))
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--merges", nargs="*", default=["nearest", "gptq"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
