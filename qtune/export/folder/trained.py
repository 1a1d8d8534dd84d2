"""What an export is made from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.data.calibration import Text
from qtune.model.checkpoint import stored_dtype
from qtune.model.merge import Onto, base_model
from qtune.model.start import Start
from qtune.recipe import Recipe

Form = Literal["pair", "merged"]


@dataclass(frozen=True)
class Trained:
    """The trained model and where it came from.

    `base_folder` holds the weights it was loaded from, `onto` says what 16-bit exports merge the
    adapter onto, `form` which form quantized exports take, `start` what the adapter began with,
    `text` gives what merged weights are calibrated with.
    """

    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    base_folder: Path
    onto: Onto = "original"
    form: Form = "pair"
    start: Start = field(default_factory=dict)
    text: Callable[[], Text] | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model inside, whose layers the adapter wraps."""
        return base_model(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of training."""
        found: torch.dtype = self.base.dtype
        return found

    @property
    def round_to(self) -> torch.dtype | None:
        """The dtype of training, to which a base in float32 is rounded; None for other bases."""
        return self.dtype if stored_dtype(self.base_folder) == torch.float32 else None
