"""A base model in 16 bits as a GGUF file, for an adapter to be put onto."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qtune.export.folder.companions import generation_config
from qtune.export.gguf_file.mixes import MIXES
from qtune.export.gguf_file.write import Described, write_model
from qtune.model.checkpoint import Names, distinct_tensors


def write_base(base_folder: Path, path: Path) -> None:
    """Write the model in `base_folder` into one float16 file; UserError: llama.cpp has no such."""
    config = AutoConfig.from_pretrained(base_folder)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    with torch.device("meta"):
        names = Names.of(AutoModelForCausalLM.from_config(config))
    stops = generation_config(base_folder, tokenizer)["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    tied = config.tie_word_embeddings
    described = Described(base_folder.name, config, tokenizer, stops, tied)
    tensors = ((name, tensor) for _, name, tensor in distinct_tensors(base_folder, names))
    write_model(path, tensors, described, MIXES["f16"])
