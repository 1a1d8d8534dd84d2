from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.errors import UserError
from qtune.model import gguf
from qtune.model.folder import check_folder
from qtune.model.gguf import convert, open_gguf


def converted(path: Path) -> Path:
    folder = path.parent / "converted"
    folder.mkdir()
    convert(path, folder, report=lambda line: None)
    return folder


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_model_in_the_file(tiny_gguf, tmp_path, kind, tied):
    truth = tiny_gguf(kind=kind, tied=tied).write(tmp_path / "x.gguf")
    folder = converted(tmp_path / "x.gguf")
    check_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, truth(ids).logits, rtol=1e-5, atol=1e-5)
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not tied)
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}


def test_qwen3_rows_stay_in_place(tiny_gguf, tmp_path):
    truth = tiny_gguf(architecture="qwen3", pre="qwen2").write(tmp_path / "x.gguf")
    model = AutoModelForCausalLM.from_pretrained(converted(tmp_path / "x.gguf"), dtype="float32")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, truth(ids).logits, rtol=1e-5, atol=1e-5)


def test_large_models_are_written_in_shards(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_SHARD_BYTES", 40_000)
    truth = tiny_gguf().write(tmp_path / "x.gguf")
    folder = converted(tmp_path / "x.gguf")
    check_folder(folder)
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in truth.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_stop_token_and_special_ids(tiny_gguf, tmp_path):
    tiny_gguf().write(tmp_path / "x.gguf")
    folder = converted(tmp_path / "x.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>hello<|im_end|>"


def test_every_truncation_is_one_clear_error(tiny_gguf, tmp_path):
    whole = tmp_path / "x.gguf"
    tiny_gguf().write(whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 20, 100, 1000, 3000, 8000, len(content) // 2, len(content) - 40]:
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            open_gguf(cut)


def test_split_files_are_refused(tiny_gguf, tmp_path):
    from gguf import GGUFValueType

    tiny_gguf(meta={"split.count": (2, GGUFValueType.UINT16)}).write(tmp_path / "x.gguf")
    with pytest.raises(UserError, match="one of 2 parts"):
        open_gguf(tmp_path / "x.gguf")


def test_tensors_without_a_place_are_refused(tiny_gguf, tmp_path):
    tiny_gguf(extra={"blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32)}).write(
        tmp_path / "x.gguf"
    )
    with pytest.raises(UserError, match="ffn_gate_exps"):
        converted(tmp_path / "x.gguf")


def test_missing_tensors_are_named(tiny_gguf, tmp_path):
    from gguf import GGUFValueType

    # The file says three blocks and has two.
    tiny_gguf(meta={}).write(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    key = b"llama.block_count" + GGUFValueType.UINT32.to_bytes(4, "little")
    assert content.count(key + b"\x02") == 1
    (tmp_path / "x.gguf").write_bytes(content.replace(key + b"\x02", key + b"\x03"))
    with pytest.raises(UserError, match=r"model\.layers\.2\..* has None"):
        converted(tmp_path / "x.gguf")


def test_architecture_that_nobody_reads(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "x.gguf", "nonesuch")
    writer.add_tensor("t", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="nonesuch"):
        converted(tmp_path / "x.gguf")
