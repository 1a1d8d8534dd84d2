"""The code of the card is run as it is written, and gives the answer that was written down."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtune.data.rows import Row
from qtune.export.exporter import Trained, export, form_of
from qtune.export.folder import card, golden
from qtune.export.folder.usage import usage
from qtune.export.verify import add_golden, reload
from qtune.recipe import FormatName, Quant

# that fit into the context of the tiny model, with the prompt
NUM_TOKENS = 32
CPU = torch.device("cpu")


@pytest.fixture
def exported(train: Callable[..., Trained], tmp_path: Path) -> Callable[..., Path]:
    """A maker of exports with one golden prompt, a conversation."""

    def make(name: str, format: FormatName = "nf4") -> Path:
        trained = train(quant=Quant(format=format))
        trained = replace(trained, form=form_of(name, trained.recipe))
        folder = export(name, trained, tmp_path / name)
        model = reload(name, folder, trained.base_folder, CPU)
        messages = [
            {"role": "user", "content": 'it\'s "so"'},
            {"role": "assistant", "content": "b"},
        ]
        prompts = golden.prompts(trained.tokenizer, [Row("x", 1, messages)], [])
        add_golden(folder, model, trained.tokenizer, prompts, max_new_tokens=NUM_TOKENS)
        card.write(folder)
        return folder

    return make


def code_of(folder: Path, language: str) -> list[str]:
    text = (folder / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    ("name", "format", "library"),
    [
        ("adapter", "nf4", "peft"),
        ("bf16", "nf4", "transformers"),
        ("qtune", "nf4", "qtune"),
        ("bitsandbytes", "nf4", "bitsandbytes"),
        ("compressed-tensors-w4a16", "int4_sym", "compressed_tensors"),
    ],
)
def test_code_of_the_card_gives_the_golden_answer(
    name: str,
    format: FormatName,
    library: str,
    exported: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(library)
    folder = exported(name, format)
    expected = json.loads((folder / "qtune.json").read_text())["golden"][0]["greedy_text"]
    (code,) = code_of(folder, "python")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    # as it is, but for the length of the answer, which the context of the tiny model limits
    exec(code.replace("max_new_tokens=128", f"max_new_tokens={NUM_TOKENS}"), {})
    assert capsys.readouterr().out == expected + "\n"


def test_code_for_onnx_gives_the_golden_answer(
    exported: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = exported("onnx")
    entry = json.loads((folder / "qtune.json").read_text())["golden"][0]
    (code,) = code_of(folder, "python")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code.replace("max_length=512", f"max_length={len(entry['prompt_ids']) + NUM_TOKENS}"), {})
    assert capsys.readouterr().out.endswith(entry["greedy_text"] + "\n")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("bf16", "vllm serve ."),
        ("adapter", "vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules tuned=."),
        ("qtune", None),
    ],
)
def test_commands_of_vllm(
    name: str, command: str | None, exported: Callable[..., Path], bases: dict[str, Path]
) -> None:
    found = [line for line in code_of(exported(name), "sh") if line.startswith("vllm")]
    assert found == ([] if command is None else [command.format(base=bases["llama"]) + "\n"])


def test_pair_of_vllm_serves_the_adapter_beside_it(exported: Callable[..., Path]) -> None:
    folder = exported("qtune")
    written = json.loads((folder / "qtune.json").read_text()) | {"export": "gptq"}
    text = usage(folder, written)
    assert "vllm serve . --dtype float16 --enable-lora --max-lora-rank 8 --lora-modules " in text
    assert "qtune serve-check http://localhost:8000 . --model tuned" in text
    assert "pip install transformers accelerate gptqmodel optimum peft" in text


def test_adapter_that_vllm_refuses_has_no_command(exported: Callable[..., Path]) -> None:
    folder = exported("adapter")
    written = json.loads((folder / "qtune.json").read_text()) | {"vllm": ["it is odd; merge it"]}
    text = usage(folder, written)
    assert "It does not load this adapter: it is odd; merge it." in text
    assert "vllm serve" not in text


def test_commands_of_llama_cpp(tmp_path: Path) -> None:
    whole, pair, adapter = (tmp_path / name for name in ("whole", "pair", "adapter"))
    for path in (
        whole / "model.gguf",
        pair / "model.gguf",
        pair / "adapter" / "adapter.gguf",
        adapter / "adapter.gguf",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for folder, name, command in (
        (whole, "gguf-q8_0", "llama-server -m model.gguf --jinja --port 8080\n"),
        (pair, "gguf-q8_0", "llama-server -m model.gguf --lora adapter/adapter.gguf --jinja"),
        (adapter, "adapter-gguf", "llama-server -m BASE.gguf --lora adapter.gguf --jinja"),
    ):
        text = usage(folder, {"export": name})
        assert command in text and "```python" not in text


def test_long_conversations_are_not_copied_into_the_card(exported: Callable[..., Path]) -> None:
    folder = exported("bf16")
    written = json.loads((folder / "qtune.json").read_text())
    written["golden"][0]["messages"][0]["content"] = "long" * 500
    text = usage(folder, written)
    assert "longlong" not in text and "What can you do?" in text
