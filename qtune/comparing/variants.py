"""What `qtune compare` measures of a recipe: formats times methods times starts of adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast, get_args

from qtune.errors import UserError
from qtune.progress import say
from qtune.recipe import FormatName, InitName, MethodName, Quant, Recipe

# the words for methods, of which one also rotates
ROTATED = "gptq+rotate"
METHODS = (*get_args(MethodName), ROTATED)
DENSE = "16-bit"


@dataclass(frozen=True)
class Variant:
    """The recipe with another base, before any training."""

    recipe: Recipe

    @property
    def name(self) -> str:
        """Format, method and start in words; a group size that is not the usual one."""
        quant = self.recipe.quant
        if quant.format is None:
            return DENSE
        words: list[str] = [quant.format]
        if quant.group_size != Quant().group_size:
            size = quant.group_size
            words.append(f"g{size}" if isinstance(size, int) else f"a {size}")
        if quant.layers:
            words.append("mixed")
        if quant.method != "nearest":
            words.append(self.method)
        if self.recipe.lora.init != "zero":
            words.append(self.recipe.lora.init)
        return " ".join(words)

    @property
    def method(self) -> str:
        """The word for how codes are chosen."""
        quant = self.recipe.quant
        return f"{quant.method}+rotate" if quant.rotate else quant.method


def variants(
    recipe: Recipe,
    formats: Sequence[FormatName],
    methods: Sequence[str] = ("nearest",),
    inits: Sequence[InitName] = ("zero",),
) -> list[Variant]:
    """The 16-bit model and all combinations that there are; what is left out is said, with why.

    Raises UserError for an unknown word.
    """
    for option, given, known in (
        ("--methods", methods, METHODS),
        ("--inits", inits, get_args(InitName)),
    ):
        for word in set(given) - set(known):
            raise UserError(f"{option} {word}: there are {', '.join(known)}")
    dense = replace(
        recipe.quant, format=None, method="nearest", rotate=False, layers={}, activations=None
    )
    plain = replace(recipe.lora, init="zero")
    found = [Variant(replace(recipe, quant=dense, lora=plain, adapter="lora"))]
    for format_name, method, init in product(formats, methods, inits):
        try:
            found.append(_variant(recipe, format_name, method, init))
        except UserError as error:
            say(f"left out: {format_name} {method} {init}: {error}")
    return found


def _variant(recipe: Recipe, format_name: FormatName, method: str, init: InitName) -> Variant:
    quant = replace(
        recipe.quant,
        format=format_name,
        method=cast(MethodName, method.removesuffix("+rotate")),
        rotate=method == ROTATED,
        # those of the recipe are for its own format
        layers=recipe.quant.layers if format_name == recipe.quant.format else {},
        activations=None,
    )
    return Variant(replace(recipe, quant=quant, lora=replace(recipe.lora, init=init)))
