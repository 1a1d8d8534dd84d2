"""How the layers of one model are stored: what `quantization_config` in config.json says.

The recipe's words become it in one place (`QtuneConfig.of`), and a layer's storage follows from it
and the layer's name alone. So the plan, the loader, the calibration and the exports build the same
layers, and a folder that was saved tells all that is needed to read it.
"""

from dataclasses import replace
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from qtune.quant.format import ScaleKind, ZeroKind, load_format
from qtune.quant.storage import GroupSize, Storage
from qtune.recipe import Quant

# formats that rotate weights and inputs by themselves
ROTATES_ITSELF = ("e8p",)


class QtuneConfig(QuantizationConfigMixin):
    """`quantization_config` of a model whose linear layers are QuantLinear; kept in config.json.

    `layers` has the fields of Storage that differ for some layers, by name or by whole parts of it.
    Raises UserError for an unknown format and for what Storage refuses.
    """

    def __init__(
        self,
        format: str = "nf4",
        group_size: GroupSize = 64,
        skip: list[str] | None = None,
        rotate: bool = False,
        channels: bool = False,
        scales: ScaleKind | None = None,
        zeros: ZeroKind | None = None,
        activations: Literal["int8"] | None = None,
        outliers: float = 6.0,
        layers: dict[str, dict[str, Any]] | None = None,
        **unused: Any,
    ) -> None:
        self.quant_method = "qtune"  # type: ignore[assignment]
        self.format, self.group_size = format, group_size
        self.skip = list(skip) if skip is not None else ["lm_head"]
        self.rotate, self.channels = rotate, channels
        self.scales, self.zeros = scales, zeros
        self.activations, self.outliers = activations, outliers
        self.layers = dict(layers or {})
        for name in ("", *self.layers):
            # raises for an unknown format, and for what it cannot be stored with
            load_format(self.storage(name).format)

    @classmethod
    def of(cls, quant: Quant) -> "QtuneConfig":
        """What the recipe's `quant` section says of storage; its format must not be null."""
        assert quant.format is not None
        return cls(
            format=quant.format,
            group_size=quant.group_size,
            skip=list(quant.skip),
            rotate=quant.rotate,
            channels=quant.method == "awq",
            activations=quant.activations,
            outliers=quant.outliers,
            layers={name: {"format": found} for name, found in quant.layers.items()},
        )

    def change(self, name: str, **fields: Any) -> None:
        """Store the layer of that name, or those with it in theirs, otherwise in these fields."""
        self.layers[name] = {**self._own(name), **fields}

    def storage(self, name: str) -> Storage:
        """How the layer of that name is stored; of the entries in `layers` the longest counts."""
        usual = Storage(
            format=self.format,
            group_size=self.group_size,
            rotated=self.rotate,
            channels=self.channels,
            scales=self.scales,
            zeros=self.zeros,
            activations=self.activations,
            outliers=self.outliers,
        )
        found = replace(usual, **self._own(name))
        return replace(found, rotated=False) if found.format in ROTATES_ITSELF else found

    def expert_storage(self, name: str) -> Storage:
        """How a matrix of experts of that name is stored.

        Its codes are found without calibration, where rotation loses more than it gains.
        """
        return replace(self.storage(name), rotated=False, channels=False)

    def _own(self, name: str) -> dict[str, Any]:
        fitting = [key for key in self.layers if f".{key}." in f".{name}."]
        return self.layers[max(fitting, key=len)] if fitting else {}
