"""What an export is made from."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from qtune.export.folder.trained import Trained


def test_only_a_float32_base_is_rounded(
    train: Callable[..., Trained], write_base: Callable[..., Path], tmp_path: Path
) -> None:
    dtypes = {torch.float32: torch.bfloat16, torch.float16: None, torch.bfloat16: None}
    for number, (dtype, rounded) in enumerate(dtypes.items()):
        trained = train(base=write_base(tmp_path / str(number), "llama", dtype))
        assert trained.round_to == rounded
        assert trained.dtype == torch.bfloat16, "training is in bf16 whatever is stored"
        assert isinstance(trained.base, LlamaForCausalLM)
