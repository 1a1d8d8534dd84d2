"""What integer containers ask of a run: of the base of a pair, and of merged weights.

Asked before training, from the recipe alone. Widths are only known later (`int_weight.py`).
"""

from qtune.export.folder.trained import Form, Trained
from qtune.recipe import FormatName, Quant, Recipe

# what vLLM has kernels for; a row is one group of each container too
GROUP_SIZES = (32, 64, 128, "row")


def why_not(recipe: Recipe, form: Form, formats: tuple[FormatName, ...]) -> list[str]:
    """The first reason why a container of these formats cannot hold the recipe's base, if any.

    For the merged form there is none: weights are quantized as the container wants them.
    """
    quant = recipe.quant
    allowed, sizes = " or ".join(formats), ", ".join(map(str, GROUP_SIZES))
    problems = [
        (
            quant.format not in formats,
            f"it holds {allowed} and quant.format is {quant.format or 'null'}; set quant.format: "
            f"{formats[0]}",
        ),
        (
            quant.group_size not in GROUP_SIZES,
            f"quant.group_size {quant.group_size} is not one of {sizes}; take 64",
        ),
        (bool(quant.layers), "it has one format for all layers; leave quant.layers out"),
        (quant.rotate, "it has no rotation; set quant.rotate: false"),
        (quant.method == "awq", "it has no channel factors; set quant.method: gptq"),
        (
            quant.activations is not None,
            "the base was trained with rounded inputs; leave quant.activations out",
        ),
    ]
    found = [f"{text}, or export the merged form" for is_there, text in problems if is_there]
    return [] if form == "merged" else found[:1]


def merged_quant(recipe: Recipe, format: FormatName) -> Quant:
    """How merged weights are quantized to one of these formats."""
    size = recipe.quant.group_size
    return Quant(
        format=format,
        group_size=size if size in GROUP_SIZES else 64,
        skip=recipe.quant.skip,
        method=recipe.merge.method,
        calibration=recipe.quant.calibration,
    )


def group_entry(trained: Trained) -> int:
    """The group size as checkpoints say it: weights, or -1 where a row is one group."""
    size = trained.recipe.quant.group_size
    return size if isinstance(size, int) else -1
