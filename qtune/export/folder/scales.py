"""Which exports can hold what `adapter: scales`, `lora + scales` and `qa-lora` train, and why not.

Trained scales, and zero points with an update merged into them, are those of the base's codes. So
they go wherever these codes go as they are, or as dequantized 16-bit weights, and nowhere else.
Trained scales are float16; trained zero points are no whole numbers.
"""

from qtune.export.folder.trained import Form
from qtune.recipe import Recipe

# of PEFT: nothing but updates
ADAPTERS = ("adapter", "adapter-gguf")
# whole zero points
WHOLE_ZEROS = ("gptq", "gptq-int8", "awq", "compressed-tensors-w4a16", "compressed-tensors-w8a16")


def why_not(name: str, recipe: Recipe, form: Form, *, quantizes: bool) -> list[str]:
    """Why the export of that name cannot hold what the recipe trains; empty: it can.

    `quantizes` says whether its merged form would quantize merged weights.
    """
    if recipe.adapter == "lora":
        return []
    what = f"what adapter: {recipe.adapter} trains"
    reasons = [
        (
            name in ADAPTERS,
            f"{what} belongs to codes of the base, which PEFT has not; export qtune or bf16",
        ),
        (
            not quantizes and recipe.merge.base == "original",
            f"{what} goes onto codes, not onto original weights; set merge.base: dequantized",
        ),
        (
            quantizes and form == "merged",
            f"new codes would have no use for {what}; set merge.quantized: pair",
        ),
        (
            name == "bitsandbytes",
            "it keeps scales in 8 bits, and trained ones are float16; export qtune or bf16",
        ),
        (
            name in WHOLE_ZEROS and (recipe.adapter == "qa-lora" or recipe.scales.zeros),
            "it holds whole zero points, and trained ones are none; export qtune or bf16",
        ),
    ]
    return [text for is_so, text in reasons if is_so][:1]
