"""The recipe's `quant` section: the number formats of the base, and how codes are found."""

from dataclasses import dataclass, field
from typing import Literal

from qtune.errors import UserError, check_at_least

FormatName = Literal[
    "nf4",
    "fp4",
    "int8",
    "int4",
    "int3",
    "int2",
    "int4_sym",
    "int3_sym",
    "int2_sym",
    "lm4",
    "lm3",
    "lm2",
    "ternary",
    "e8p",
]
MethodName = Literal["nearest", "gptq", "awq"]
GroupSize = int | Literal["row", "tensor"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text on which methods and adapter starts measure what each layer is given."""

    text: str = "train"
    """`train`, the training samples, or a text file, or both: `train + FILE`."""
    tokens: int = 16384
    """Tokens of it that are used."""
    length: int = 1024
    """Tokens of a row; a row of text ends where the next begins."""
    sequential: bool = True
    """Measures each layer on what the quantized ones before it hand on; false: the 16-bit ones."""
    damping: float = 0.01
    """Added to the diagonal of a Hessian, in parts of its mean; raised where that is not enough."""

    def __post_init__(self) -> None:
        check_at_least(self, "quant.calibration", 1, "tokens")
        check_at_least(self, "quant.calibration", 16, "length")
        if self.damping <= 0:
            raise UserError(f"quant.calibration.damping ({self.damping}) must be positive")


@dataclass(frozen=True, kw_only=True)
class Quant:
    """How the frozen base model is stored."""

    format: FormatName | None = "nf4"
    """Number format of the frozen linear layers; null keeps them in 16 bits (plain LoRA)."""
    group_size: GroupSize = 64
    """Weights that share one scale: a power of two, `row` or `tensor`."""
    skip: tuple[str, ...] = ("lm_head",)
    """Layers that stay in 16 bits: names, or parts of names."""
    layers: dict[str, FormatName] = field(default_factory=dict)
    """Other formats for layers with this in their names, the longest counts; see `qtune plan`."""
    method: MethodName = "nearest"
    """How codes are chosen: each by itself, or for outputs that change least."""
    rotate: bool = False
    """Rotates each layer's inputs so that no weight stands out (arXiv 2402.04396); for gptq."""
    activations: Literal["int8"] | None = None
    """int8: products of integers, outlying inputs in 16 bits (LLM.int8(), arXiv 2208.07339)."""
    outliers: float = 6.0
    """Inputs of that size stay in 16 bits where activations are int8; 0: none do."""
    calibration: Calibration = field(default_factory=Calibration)
    """Text for gptq, awq and the starts of adapters that need it."""

    def __post_init__(self) -> None:
        self._check_group_size()
        self._check_rotation()
        if self.activations and (self.format != "int8" or self.layers):
            raise UserError("quant.activations: int8 is for quant.format: int8 in all layers")
        if self.method != "nearest" and self.format is None:
            raise UserError(f"quant.method: {self.method} needs a quant.format")
        check_at_least(self, "quant", 0, "outliers")

    def _check_group_size(self) -> None:
        size = self.group_size
        if isinstance(size, int) and (size < 16 or size & (size - 1)):
            raise UserError(
                f"quant.group_size ({size}) must be a power of two, 16 or more, or row or tensor; "
                "try 64"
            )

    def _check_rotation(self) -> None:
        """E8P rotates by itself; elsewhere rotation without a Hessian makes things worse."""
        if self.rotate and self.method != "gptq" and self.format != "e8p":
            raise UserError(
                f"quant.rotate with quant.method: {self.method} loses more than it gains; "
                "set quant.method: gptq"
            )
        if self.format == "e8p" and self.method != "gptq":
            raise UserError("quant.format: e8p needs quant.method: gptq")
