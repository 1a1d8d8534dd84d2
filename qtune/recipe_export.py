"""The recipe's `merge` section and the names of exports: what becomes of a trained model."""

from dataclasses import dataclass
from typing import Literal

from qtune.errors import UserError
from qtune.recipe_quant import MethodName

ExportName = Literal[
    "adapter",
    "adapter-gguf",
    "bf16",
    "fp16",
    "bitsandbytes",
    "bitsandbytes-int8",
    "gptq",
    "gptq-int8",
    "awq",
    "compressed-tensors-w4a16",
    "compressed-tensors-w8a16",
    "compressed-tensors-w8a8",
    "compressed-tensors-fp8",
    "gguf-f16",
    "gguf-q8_0",
    "gguf-q6_k",
    "gguf-q5_k_m",
    "gguf-q4_k_m",
    "gguf-q3_k_m",
    "gguf-q2_k",
    "gguf-q4_0",
    "onnx",
    "qtune",
]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How the adapter is folded into weights, and how much of the tuning must survive it."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """What it is added to; auto measures both and takes the one with the lower held-out loss."""
    quantized: Literal["auto", "pair", "merged"] = "auto"
    """Quantized exports: `pair`, base and adapter, exact, or `merged`; auto: exact where it can."""
    method: MethodName = "gptq"
    """How merged weights get integer codes, on the text of quant.calibration."""
    recovery: float = 0.98
    """Share of the tuning gain (held-out loss) that a merge must keep; below, it is refused."""
    kv_scales: bool = False
    """Writes measured scales for keys and values in fp8, where a format carries them."""

    def __post_init__(self) -> None:
        if not self.recovery <= 1:
            raise UserError(f"merge.recovery ({self.recovery}) is a share, at most 1; try 0.98")
