"""What number formats, methods and adapter starts lose of a model, on a text: the table of
docs/quality.md.

    python benchmarks/quality.py --text wikitext2-valid.txt

A sweep over what `qtune compare` measures. The first part of the text is what calibration sees, the
last one is held out; both are cut into rows of 1024 tokens. The mixture is what `qtune sense` and
`qtune plan` make of the first part, in no more bytes than 3 bits take. Forms that have been
measured are not measured again. Writes docs/quality.json, docs/quality.png, docs/sense.png and the
table of docs/quality.md.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

from text_parts import text_parts
from transformers import AutoConfig

from qtune.comparing.compare_formats import compare
from qtune.comparing.comparison import Comparison, markdown, read, write
from qtune.comparing.comparison_plot import plot
from qtune.files import write_text
from qtune.model.sources import resolve
from qtune.planning.planner import plan
from qtune.planning.sizes import sizes
from qtune.recipe import Calibration, Data, Evaluate, FormatName, Quant, Recipe, Train
from qtune.sensing.sense import sense

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/quality.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->"
RESULTS, PLOT = ROOT / "docs/quality.json", ROOT / "docs/quality.png"
SENSE_PLOT = ROOT / "docs/sense.png"
CONTEXT = 1024
CALIBRATION_ROWS = 12
HELD_OUT_ROWS = 8
NEAREST = [name for name in get_args(FormatName) if name != "e8p"]
INTEGERS = ["int4", "int3", "int2"]
# formats, methods, starts; group size
SWEEPS: dict[str, list[tuple[list[str], list[str], list[str], int | str]]] = {
    "nearest": [
        (NEAREST, ["nearest"], ["zero"], 64),
        (["int8", "int4", "nf4"], ["nearest"], ["zero"], "row"),
        (["int8", "int4"], ["nearest"], ["zero"], "tensor"),
        (["int4", "int2"], ["nearest"], ["zero"], 32),
        (["nf4"], ["nearest"], ["cloq", "loftq", "pissa"], 64),
    ],
    "calibrated": [
        (INTEGERS, ["gptq", "gptq+rotate"], ["zero"], 64),
        (["e8p"], ["gptq"], ["zero"], 64),
        (["int3", "int2"], ["gptq+rotate"], ["cloq"], 64),
        (["int4"], ["awq"], ["zero"], 64),
    ],
}
# what the mixture is made of, and what it is to be smaller than: both found with ROTATED
MIXED, MIXED_OF, UNIFORM = "mixed", ["int4", "int3", "e8p"], "int3"
ROTATED = "gptq+rotate"


def recipe(model: str, text: Path, folder: Path) -> Recipe:
    """A recipe whose rows are those of the text."""
    parts = text_parts(text, folder)
    calibration = Calibration(text=parts.train, tokens=CALIBRATION_ROWS * CONTEXT, length=CONTEXT)
    return Recipe(
        model=model,
        data=Data(
            train=parts.train,
            validation=parts.held_out,
            max_length=CONTEXT,
            overlong="split",
        ),
        quant=Quant(calibration=calibration),
        train=Train(objective="pretrain", steps=1),
        evaluate=Evaluate(loss_rows=HELD_OUT_ROWS, answer_rows=0),
        run=folder / "run",
    )


def mixture(base: Recipe, folder: Path) -> Recipe:
    """The recipe with a format for each layer, chosen by its calibration text alone."""
    calibration = base.quant.calibration
    uniform = replace(base.quant, format=UNIFORM, method="gptq", rotate=True)
    config = AutoConfig.from_pretrained(resolve(base.model, report=print))
    measured = sense(
        base.model,
        text=Path(calibration.text),
        formats=MIXED_OF,
        method=ROTATED,
        tokens=calibration.tokens,
        out=folder / "sense.jsonl",
    )
    chosen = plan(
        [base.model],
        "1TB",
        CONTEXT,
        serve=True,
        formats=MIXED_OF,
        bits_budget=sizes(config, uniform).bits,
        sense=measured.path,
        out=folder / "fragment.yaml",
    ).chosen
    return replace(base, quant=replace(chosen.quant, calibration=calibration))


def main() -> None:
    """Measure the sweeps that are wanted, and write all that has been measured."""
    options = _options()
    base = recipe(options.model, options.text, options.folder)
    for sweep in options.sweeps:
        folder = options.folder / sweep
        for formats, methods, starts, group_size in SWEEPS.get(sweep, []):
            changed = replace(base, quant=replace(base.quant, group_size=group_size))
            compare(changed, formats, methods, starts, folder)
        if sweep == MIXED:
            mixed = mixture(base, folder)
            compare(mixed, [mixed.quant.format], [ROTATED], ["zero"], folder)
            shutil.copyfile(folder / "sense.png", SENSE_PLOT)
    parts = [options.folder / sweep / "compare.json" for sweep in (*SWEEPS, MIXED)]
    _write([path for path in parts if path.exists()])


def _write(parts: list[Path]) -> None:
    """One table and one picture of all sweeps that there are."""
    whole = Comparison(json.loads(parts[0].read_text("utf-8"))["measured_on"])
    for path in parts:
        for line in read(path, whole.measured_on).lines:
            whole.put(line)
    write(whole, RESULTS)
    plot(whole.lines, PLOT)
    write_text(PAGE, page(PAGE.read_text("utf-8"), whole))


def page(text: str, found: Comparison) -> str:
    """The text of docs/quality.md with this table."""
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}{markdown(found.lines)}{MARKS[1]}{after}"


def _options() -> argparse.Namespace:
    sweeps = [*SWEEPS, MIXED]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--sweeps", nargs="+", default=sweeps, choices=sweeps)
    return parser.parse_args()


if __name__ == "__main__":
    main()
