"""The merge into 16 bits as it is judged: onto which weights, and what of the tuning it keeps.

A merged model is served in place of the trained one, so it has to be that model. What counts is its
loss on held-out data: the share of the tuning gain that is left, from the quantized base without
adapter (0) to the trained model (1). Layer by layer it is told how large the adapter's change is
beside a step of the base's numbers: that is what quantizing the merge again would round away.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtune.evaluate.compare import Merge, Row
from qtune.export.folder.trained import Trained
from qtune.model.folder import is_quantized
from qtune.model.merge import Onto
from qtune.model.survival import Survival, explain, merge_report
from qtune.progress import say
from qtune.recipe import Recipe

# exports that are one merged model in 16 bits
MERGED = ("bf16", "fp16")


def bases(recipe: Recipe) -> list[Onto]:
    """What the recipe lets an adapter be merged onto, the trained one last.

    Without a format both are the same. Trained scales and codes are those of the quantized base,
    and go onto nothing else.
    """
    if recipe.quant.format is None:
        return ["original"]
    if recipe.adapter != "lora" or recipe.train.merge_aware:
        return ["dequantized"]
    wanted = recipe.merge.base
    return ["original", "dequantized"] if wanted == "auto" else [wanted]


@dataclass(frozen=True)
class Verdict:
    """Which of the merges is kept, and why; `refused` says why none should be."""

    chosen: Onto
    why: str
    refused: str | None = None

    @property
    def merge(self) -> Merge:
        """What eval.json says of it."""
        return Merge(self.chosen, self.why)


def judge(rows: Mapping[Onto, Row | None], least_recovery: float) -> Verdict:
    """The merge with the lowest held-out loss; refused where it lost too much of the tuning gain.

    Of merges that were not measured, None, the last is taken: it is the trained model.
    """
    measured = {onto: row for onto, row in rows.items() if row is not None}
    if not measured:
        return Verdict(list(rows)[-1], "not measured")
    best = min(measured, key=lambda onto: measured[onto].loss)
    losses = ", ".join(f"{row.loss:.4f} onto {onto}" for onto, row in measured.items())
    why = f"held-out loss {losses}"
    recovery = measured[best].recovery
    if recovery is None or recovery >= least_recovery:
        return Verdict(best, why)
    return Verdict(
        best,
        why,
        f"merging keeps {recovery:.1%} of what training gained, less than merge.recovery "
        f"({least_recovery:.0%}); serve the pair (`qtune export RUN --exact`), export fp16, which "
        "rounds less, or merge all the same with `qtune merge RUN --force`",
    )


def layers(trained: Trained) -> list[dict[str, Any]]:
    """Of each layer that an adapter changes: its change and its quantization error, relative to
    the weights, and the share of the change that quantizing again would keep. Says the sums.

    Empty where there is nothing to compare: no quantized layers, no adapter, no 16-bit weights.
    """
    if is_quantized(trained.base_folder):
        return []
    report = merge_report(trained.base_folder, trained.model)
    for line in explain(report):
        say(line)
    return [_figures(layer) for layer in report]


def _figures(layer: Survival) -> dict[str, Any]:
    return {
        "layer": layer.name.removesuffix(".weight"),
        "change_ratio": layer.change_ratio,
        "error_ratio": layer.error_ratio,
        "share": layer.share,
    }
