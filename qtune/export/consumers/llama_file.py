"""A GGUF file that llama.cpp has loaded: its weights, its tokenizer and an adapter on top."""

import ctypes
import weakref
from pathlib import Path

from qtune.errors import UserError
from qtune.export.consumers.llama_library import last_error, library, messages


class LlamaFile:
    """The model in a GGUF file, with the LoRA of a second one if there is one.

    Raises UserError where xllamacpp is missing or llama.cpp cannot load a file.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        self.library = library()
        messages.clear()
        parameters = self.library.llama_model_default_params()
        self.model = self.library.llama_model_load_from_file(bytes(path), parameters)
        if not self.model:
            raise UserError(f"llama.cpp cannot load {path}: {last_error()}")
        # adapters are freed with their model
        weakref.finalize(self, self.library.llama_model_free, self.model)
        self.adapter = self._load_adapter(adapter) if adapter is not None else None
        self._vocabulary = self.library.llama_model_get_vocab(self.model)
        self.num_tokens: int = self.library.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str, *, add_special: bool = False, special: bool = True) -> list[int]:
        """The ids of a text. With `special`, special tokens in it are known as such.

        With `add_special` the ids are there that the file says to put around a text.
        """
        data = text.encode()
        # a token is a byte at least; a blank, a BOS and an EOS may be added
        room = len(data) + 4
        ids = (ctypes.c_int32 * room)()
        num: int = self.library.llama_tokenize(
            self._vocabulary, data, len(data), ids, room, add_special, special
        )
        return list(ids[:num])

    def ends_answer(self, token: int) -> bool:
        """Whether llama.cpp stops at this token."""
        return bool(self.library.llama_vocab_is_eog(self._vocabulary, token))

    def _load_adapter(self, path: Path) -> int:
        adapter: int | None = self.library.llama_adapter_lora_init(self.model, bytes(path))
        if not adapter:
            raise UserError(f"llama.cpp cannot load the adapter {path}: {last_error()}")
        return adapter
