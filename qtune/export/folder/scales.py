"""Which exports can hold what `adapter: scales`, `lora + scales` and `qa-lora` train, and why not.

Trained scales, and zero points with an update merged into them, are those of the base's codes. So
they go wherever these codes go as they are, and nowhere else.
"""

from qtune.export.folder.trained import Form
from qtune.recipe import Recipe


def why_not(name: str, recipe: Recipe, form: Form) -> list[str]:
    """Why the export of that name cannot hold what the recipe trains; empty: it can."""
    if recipe.adapter == "lora":
        return []
    what = f"what adapter: {recipe.adapter} trains"
    if name == "adapter":
        return [f"{what} belongs to codes of the base, which PEFT has not; export qtune or bf16"]
    if name == "bf16" and recipe.merge.base == "original":
        return [f"{what} goes onto codes, not onto original weights; set merge.base: dequantized"]
    if name == "bitsandbytes":
        return ["it keeps scales in 8 bits, and trained ones are float16; export qtune or bf16"]
    if name == "qtune" and form == "merged":
        return [f"new codes would have no use for {what}; set merge.quantized: pair"]
    return []
