from pathlib import Path

import pytest

from qtune.errors import UserError

pytest.importorskip("xllamacpp")

from qtune.export.consumers.llama_file import LlamaFile


def test_the_reason_is_told_where_a_file_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=r"cannot load .*broken.gguf: .*(gguf|model)"):
        LlamaFile(broken)


def test_a_missing_adapter_is_told(gguf_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the adapter .*none.gguf"):
        LlamaFile(gguf_path, tmp_path / "none.gguf")


def test_tokens(gguf_path: Path) -> None:
    file = LlamaFile(gguf_path)
    assert file.num_tokens == 320
    assert file.tokenize("") == []
    assert file.tokenize("<|im_end|>") == [2]
    assert len(file.tokenize("<|im_end|>", special=False)) == len("<|im_end|>")
    assert file.ends_answer(2) and file.ends_answer(0) and not file.ends_answer(7)


def test_nothing_is_printed(gguf_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LlamaFile(gguf_path)
    assert capfd.readouterr() == ("", "")
