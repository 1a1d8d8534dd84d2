"""How the weights of a family of models differ between transformers and llama.cpp.

Names are those of the `gguf` package, which llama.cpp's own converter uses. Two things beside names
differ: llama.cpp's rotary embedding of Llama takes pairs of neighbouring rows of queries and keys,
where transformers takes one of each half of a head; and Gemma's norms multiply by 1 + weight, which
llama.cpp wants added already.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtune.errors import UserError


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture, and what it wants done to weights."""

    architecture: str
    permutes: bool = False
    """Whether rows of queries and keys change places."""
    norms_plus_one: bool = False


FAMILIES = {
    "llama": Family("llama", permutes=True),
    "mistral": Family("llama", permutes=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norms_plus_one=True),
    "gemma3_text": Family("gemma3", norms_plus_one=True),
    "phi3": Family("phi3"),
}


def family_of(model_type: str) -> Family:
    """The family of a model by the `model_type` of its config; UserError for an unknown one."""
    if model_type not in FAMILIES:
        raise UserError(
            f"qtune writes no GGUF files of {model_type} models, only of {', '.join(FAMILIES)}; "
            "export bf16 and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    return FAMILIES[model_type]


class TensorNames:
    """Names and values of a model's tensors in llama.cpp, from those in transformers."""

    def __init__(self, config: Any) -> None:
        import gguf

        self.config, self.family = config, family_of(config.model_type)
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        architecture = numbers[self.family.architecture]
        self._names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def name(self, parameter: str) -> str:
        """The name in the file of a transformers parameter; UserError: there is none."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(
                f"{parameter}: llama.cpp has no such tensor in {self.family.architecture} models; "
                "train without it (lora.modules_to_save, embeddings), or export bf16"
            )
        return str(found)

    def value(self, parameter: str, tensor: Tensor) -> Tensor:
        """The tensor as llama.cpp wants it, in the dtype that it has."""
        if self.family.permutes and ("q_proj" in parameter or "k_proj" in parameter):
            return interleaved(tensor, self.num_heads(parameter))
        if self.family.norms_plus_one and parameter.endswith("norm.weight"):
            return tensor.float() + 1
        return tensor

    def num_heads(self, parameter: str) -> int:
        """Heads of the queries or keys that a matrix makes."""
        heads = "num_attention_heads" if "q_proj" in parameter else "num_key_value_heads"
        return int(getattr(self.config, heads))


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [O, ...] of each head from two halves (transformers) to pairs (llama.cpp)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape).contiguous()


def rope_dimensions(config: Any) -> int:
    """How many dimensions of each head are rotated."""
    size = head_size(config)
    return int(size * config.rope_parameters.get("partial_rotary_factor", 1.0))


def head_size(config: Any) -> int:
    """Dimensions of a head."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)
