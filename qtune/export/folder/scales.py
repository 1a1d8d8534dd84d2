"""Which exports can hold what is trained into the base's own codes, scales and zero points.

That is what `adapter: scales`, `lora + scales` and `qa-lora` train, and `train.merge_aware`. It
goes wherever these codes go as they are, or as dequantized 16-bit weights, and nowhere else.
Trained scales are float16, trained zero points no whole numbers, and codes are codes.
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
    aware = recipe.train.merge_aware
    if recipe.adapter == "lora" and not aware:
        return []
    word = "train.merge_aware" if aware else f"adapter: {recipe.adapter}"
    what = f"what {word} trains"
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
            name == "bitsandbytes" and not aware,
            "it keeps scales in 8 bits, and trained ones are float16; export qtune or bf16",
        ),
        (
            name in WHOLE_ZEROS and (recipe.adapter == "qa-lora" or recipe.scales.zeros),
            "it holds whole zero points, and trained ones are none; export qtune or bf16",
        ),
    ]
    return [text for is_so, text in reasons if is_so][:1]
