"""Why a run cannot be exported to llama.cpp, as far as that can be told before training."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from qtune.export.consumers.llama_library import MISSING
from qtune.export.gguf_file.hyperparameters import check_config
from qtune.export.gguf_file.tokenizer import vocabulary_of


def why_not() -> list[str]:
    """What is missing on this machine."""
    missing = find_spec("xllamacpp") is None
    return [f"{MISSING}, or leave this export out"] if missing else []


def check_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a model or a tokenizer that llama.cpp does not have."""
    config = AutoConfig.from_pretrained(folder)
    check_config(config)
    vocabulary_of(tokenizer, config.vocab_size)
