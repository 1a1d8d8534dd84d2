"""What is left to lose after fine-tuning: bases in few bits, adapters, and how these begin.

    python benchmarks/fine_tune.py --text wikitext2-valid.txt --model SmolLM2-135M-Instruct

Each variant is a run of `qtune train` on the same text, in the same order and with the same number
of steps; only the words that its name stands for are other. The text's last part is held out. Runs
lie in --runs and are not repeated where they have ended. Prints a table and writes
docs/tune.json.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from text_parts import TextParts, text_parts

from qtune.files import write_text
from qtune.recipe import Data, Evaluate, Lora, Quant, Recipe, Scales, Train

RESULTS = Path(__file__).parents[1] / "docs/tune.json"
TWO_BITS = Quant(format="int2", method="gptq", rotate=True)
CLOQ = Lora(init="cloq")
VARIANTS: dict[str, dict[str, Any]] = {
    "16-bit, LoRA": {"quant": Quant(format=None)},
    "nf4, LoRA from zero (QLoRA)": {},
    "nf4, LoRA from LoftQ": {"lora": Lora(init="loftq")},
    "nf4, LoRA from CLoQ": {"lora": CLOQ},
    "int3, LoRA from zero": {"quant": Quant(format="int3")},
    "int3 gptq rotated, LoRA from CLoQ": {"quant": replace(TWO_BITS, format="int3"), "lora": CLOQ},
    "int2, LoRA from zero": {"quant": Quant(format="int2")},
    "lm2, LoRA from LoftQ": {"quant": Quant(format="lm2"), "lora": Lora(init="loftq")},
    "int2 gptq, LoRA from zero": {"quant": replace(TWO_BITS, rotate=False)},
    "int2 gptq rotated, LoRA from zero": {"quant": TWO_BITS},
    "int2 gptq rotated, LoRA from CLoQ": {"quant": TWO_BITS, "lora": CLOQ},
    "int2 gptq rotated, scales": {"quant": TWO_BITS, "adapter": "scales"},
    "int2 gptq rotated, LoRA from CLoQ + scales": {
        "quant": TWO_BITS,
        "lora": CLOQ,
        "adapter": "lora + scales",
    },
    "e8p, LoRA from CLoQ": {"quant": replace(TWO_BITS, format="e8p", rotate=False), "lora": CLOQ},
}


def main() -> None:
    """Train what has not been trained, and show it."""
    options = _options()
    parts = text_parts(options.text, options.runs)
    rows = {}
    for name, changes in VARIANTS.items():
        if options.only and not any(word in name for word in options.only):
            continue
        folder = options.runs / name.replace(" ", "-").replace(",", "")
        recipe = replace(_recipe(options, parts, folder), **changes)
        rows[name] = _figures(recipe)
        print(f"{name:45} {_words(rows[name])}", flush=True)
    facts = {"text": options.text.name, "steps": options.steps, "lr": options.lr}
    write_text(RESULTS, json.dumps({"facts": facts, "rows": rows}, indent=2) + "\n")


def _recipe(options: argparse.Namespace, parts: TextParts, folder: Path) -> Recipe:
    train = Train(
        objective="pretrain",
        steps=options.steps,
        batch_size=4,
        lr=options.lr,
        warmup_steps=2,
        betas=(0.9, 0.99),
        eval_every=0,
        save_every=0,
    )
    return Recipe(
        model=options.model,
        data=Data(train=parts.train, validation=parts.held_out, max_length=512, overlong="split"),
        train=train,
        scales=Scales(lr=options.scales_lr),
        evaluate=Evaluate(loss_rows=24, answer_rows=0),
        export=(),
        run=folder,
    )


def _figures(recipe: Recipe) -> dict[str, Any]:
    """Perplexities of a run: of its base, and of what was trained."""
    from qtune import run

    if not (recipe.run / "eval.json").exists():
        run.train(recipe, resume=(recipe.run / "recipe.yaml").exists())
    rows = {row["kind"]: row for row in json.loads((recipe.run / "eval.json").read_text())["rows"]}
    return {
        "base": math.exp(rows.get("quantized", rows["base"])["loss"]),
        "trained": math.exp(rows["adapter"]["loss"]),
        "bytes": rows["adapter"]["size_bytes"],
        "tokens": rows["adapter"]["tokens"],
    }


def _words(row: dict[str, Any]) -> str:
    return f"{row['base']:12.2f} -> {row['trained']:8.2f}   {row['bytes'] / 1e6:6.1f} MB"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--runs", type=Path, default=Path("runs/tune"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--scales-lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="+", help="variants with one of these words")
    return parser.parse_args()


if __name__ == "__main__":
    main()
