"""How one quantized layer is stored: everything but its sizes."""

from dataclasses import dataclass
from typing import Literal

from qtune.errors import UserError
from qtune.quant.format import Format, ScaleKind, ZeroKind, load_format

GroupSize = int | Literal["row", "tensor"]
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Storage:
    """The number format of a layer, and what else its bytes mean; an entry of config.json.

    Raises UserError for an unknown format, for a group size that groups cannot have, for zero
    points in a format without them, and for INT8 activations with another format than int8.
    """

    format: str = "nf4"
    group_size: GroupSize = 64
    rotated: bool = False
    """Weights are those for rotated inputs (`qtune_kernels.hadamard`)."""
    channels: bool = False
    """Inputs are multiplied by stored factors, one each, before all else (AWQ)."""
    scales: ScaleKind | None = None
    """How scales are stored, where not as the format does it."""
    zeros: ZeroKind | None = None
    """How zero points are stored, where not as the format does it."""
    activations: Literal["int8"] | None = None
    outliers: float = 6.0

    def __post_init__(self) -> None:
        whole_zeros = self.number_format.zero_kind == "codes"
        check_group_size(self.group_size)
        if self.zeros == "codes" and not whole_zeros:
            raise UserError(f"{self.format} has no whole zero points; zeros may be half or float")
        if self.activations and self.format != "int8":
            raise UserError(f"activations: int8 is for format int8, not for {self.format}")

    @property
    def number_format(self) -> Format:
        """The format; raises UserError for an unknown one."""
        return load_format(self.format)

    @property
    def scale_kind(self) -> ScaleKind:
        """How scales are stored."""
        return self.scales or self.number_format.scale_kind

    @property
    def zero_kind(self) -> ZeroKind | None:
        """How zero points are stored; None: there are none."""
        return self.zeros or self.number_format.zero_kind

    def weights_of_group(self, shape: tuple[int, int]) -> int:
        """The group size in weights for a matrix [O, I]."""
        whole = {"row": shape[1], "tensor": shape[0] * shape[1]}
        return self.group_size if isinstance(self.group_size, int) else whole[self.group_size]


def check_group_size(group_size: GroupSize) -> None:
    """Raises UserError for a size that groups cannot have."""
    if isinstance(group_size, str):
        if group_size not in ("row", "tensor"):
            raise UserError(f"group_size ({group_size}) must be a number, row or tensor; try 64")
    elif group_size < SMALLEST_GROUP or group_size & (group_size - 1):
        raise UserError(
            f"group_size ({group_size}) must be a power of two, {SMALLEST_GROUP} or more, or row "
            "or tensor; try 64"
        )
