"""An inference engine behind the face of a transformers model, so that what measures one measures
the other.

The model has no parameters: its forward gives rows of token ids to the engine and takes logits
back. Padding never reaches an engine. What `generate` asks for again at every step is in the
engine's own cache of keys and values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Rows = Sequence[Sequence[int]]


class EngineModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits come from elsewhere."""

    main_input_name = "input_ids"

    @property
    def device(self) -> torch.device:
        """Where ids are taken and logits given."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.float32

    def row_logits(self, rows: Rows, wanted: Rows) -> Tensor:
        """Logits, float32 [N, V], of rows of ids at their `wanted` places, row after row."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits [B, K, V] float32 of ids [B, T], at all columns or at those of `logits_to_keep`.

        They are zero where `attention_mask` [B, T] is, and as if nothing stood there elsewhere.
        """
        width = input_ids.shape[1]
        columns = _columns(width, logits_to_keep)
        live = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        live = live.bool().cpu()
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), live, strict=True)]
        # the place of each column among the live ones of its row
        places = live.cumsum(1) - 1
        kept = live[:, columns]
        wanted = [at[columns][mask].tolist() for at, mask in zip(places, kept, strict=True)]
        found = self.row_logits(rows, wanted)
        logits = torch.zeros(len(rows), len(columns), found.shape[-1])
        logits[kept] = found
        return CausalLMOutput(logits=logits.to(input_ids.device))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 1,
        **unused: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward`: all ids each time, for the cache knows which are new."""
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "logits_to_keep": logits_to_keep,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def made_ready(model: EngineModel, folder: Path) -> None:
    """Give a model the generation settings of its folder, and let it be measured."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.train(False)


def _columns(width: int, keep: int | Tensor) -> Tensor:
    """Column numbers, int64, that `logits_to_keep` stands for: the last ones, or those in it."""
    every = torch.arange(width)
    columns = every[keep.cpu()] if isinstance(keep, Tensor) else every[-keep:]
    if (columns.diff() <= 0).any():
        raise ValueError("logits_to_keep has to be in ascending order")
    return columns
