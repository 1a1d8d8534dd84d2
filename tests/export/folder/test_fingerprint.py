"""What is kept of a folder, against the definitions, and that it tells what changed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qtune.errors import UserError
from qtune.export.exporter import Trained
from qtune.export.folder.fingerprint import changed_token, configs, files, modules, tokens


def test_files_have_their_hash_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    for name in ("a.bin", "README.md", "qtune.json", ".cache/x", "inner/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    expected = {"bytes": 7, "sha256": hashlib.sha256(b"content").hexdigest()}
    assert files(tmp_path) == {"a.bin": expected, "inner/b.txt": expected}


def test_configurations_are_kept_without_what_is_long(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4}))
    config = {"chat_template": "x", "added_tokens_decoder": {}, "pad_token": "p"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert configs(tmp_path) == {
        "adapter/adapter_config.json": {"r": 4},
        "tokenizer_config.json": {"pad_token": "p"},
    }


def test_modules_follow_every_tensor_and_not_the_files(tmp_path: Path) -> None:
    tensors = {
        "a.q.weight": torch.ones(4, dtype=torch.bfloat16),
        "a.q.weight.absmax": torch.ones(2),
        "a.k.qweight": torch.ones(2, dtype=torch.int32),
        "a.k.weight_packed": torch.ones(2, dtype=torch.int32),
        "alone": torch.ones(1),
    }
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    for folder in (whole, parts, other):
        folder.mkdir()
    save_file(tensors, whole / "model.safetensors")
    for name in ("a.q", "a.k", "alone"):
        chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(name)}
        save_file(chosen, parts / f"{name}.safetensors")
    tensors["a.q.weight.absmax"][1] = 2
    save_file(tensors, other / "model.safetensors")
    assert set(modules(whole)) == {"a.q", "a.k", "alone"}
    assert modules(parts) == modules(whole)
    found = modules(other)
    assert found["a.k"] == modules(whole)["a.k"] and found["a.q"] != modules(whole)["a.q"]


@pytest.mark.parametrize("end", [5, 60, -3])
def test_cut_off_weights_are_told(end: int, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(64)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:end])
    with pytest.raises(UserError, match=r"x.safetensors is (damaged|cut off in a.weight)"):
        modules(tmp_path)


def test_tokens_tell_the_one_that_changed(train: Callable[..., Trained]) -> None:
    tokenizer = train().tokenizer
    was = tokens(tokenizer)
    assert was["size"] == len(tokenizer.get_vocab())
    assert was["added"] == {"0": "<|endoftext|>", "1": "<|im_start|>", "2": "<|im_end|>"}
    vocabulary = tokenizer.get_vocab()

    class Other:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def __init__(self, **changes: int | None) -> None:
            self._changes = changes

        def get_vocab(self) -> dict[str, int]:
            changed = vocabulary | {k: v for k, v in self._changes.items() if v is not None}
            return {k: v for k, v in changed.items() if self._changes.get(k, v) is not None}

    one = Other(a=None, new=vocabulary["a"])
    swapped = Other(a=vocabulary["b"], b=vocabulary["a"])
    several = Other(a=None, new=vocabulary["a"], b=None, other=vocabulary["b"])
    assert changed_token(was, tokens(one)) == vocabulary["a"]
    assert changed_token(was, tokens(Other(a=None))) == vocabulary["a"]
    assert changed_token(was, tokens(swapped)) is None and tokens(swapped)["sums"] != was["sums"]
    assert changed_token(was, tokens(several)) is None
    assert changed_token(was, tokens(Other())) is None
