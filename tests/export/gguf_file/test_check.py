import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from qtune.errors import UserError
from qtune.export import exporter
from qtune.export.exporter import Trained
from qtune.export.gguf_file import check

pytest.importorskip("xllamacpp")


def test_nothing_is_missing_here() -> None:
    assert check.why_not() == []


def test_a_known_model_passes(train: Callable[..., Trained]) -> None:
    trained = train()
    exporter.check_model(("gguf-q4_k_m", "bf16"), trained.base_folder, trained.tokenizer)


def test_an_unknown_family_is_told_before_training(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    with pytest.raises(UserError, match=r"gpt_neox.*convert_hf_to_gguf"):
        exporter.check_model(("gguf-q4_k_m",), tmp_path, train().tokenizer)
    # of other exports that is no matter
    exporter.check_model(("bf16", "adapter"), tmp_path, train().tokenizer)


def test_an_unknown_tokenizer_is_told_before_training(
    train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = replace(train())
    trained.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="tokenizer"):
        check.check_model(trained.base_folder, AutoTokenizer.from_pretrained(tmp_path))
