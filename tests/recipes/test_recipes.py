"""Every recipe in recipes/: small ones run, large ones are planned without weights or GPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtune import cli
from qtune.data import demo

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = {"quickstart", "preference", "pretrain", "low-bits"}
# runs whose result no plain adapter can hold
EXPORTS = {"low-bits": "qtune"}
LLAMA: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# what the models' own config.json say, and the devices that the recipes are written for
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama-8b-24gb": (
        "llama",
        "24GiB",
        "1",
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "llama-70b-80gb": ("llama", "80GiB", "1", LLAMA),
    "llama-70b-2x24gb": ("llama", "24GiB", "2", LLAMA | {"vocab_size": 32000}),
    "qwen-32b-long": (
        "qwen2",
        "80GiB",
        "1",
        {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
        },
    ),
    "moe": (
        "qwen3_moe",
        "24GiB",
        "1",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
}


def names() -> set[str]:
    return {path.stem for path in RECIPES.glob("*.yaml")}


def test_every_recipe_is_tested_here() -> None:
    assert names() == RUNS | MODELS.keys()


def config_only(folder: Path, tiny_model: Path, kind: str, sizes: dict[str, Any]) -> Path:
    """A model folder without weights, and with the tokenizer of the tiny model."""
    folder.mkdir()
    CONFIG_MAPPING[kind](**sizes, tie_word_embeddings=False, dtype="bfloat16").save_pretrained(
        folder
    )
    config = json.loads((folder / "config.json").read_text())
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}[kind]
    config["architectures"] = [f"{prefix}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, folder)
    return folder


def long_rows(path: Path, characters: int) -> Path:
    """Conversations as long as the recipe allows: a plan goes by the largest micro-batch."""
    text = json.dumps(demo.rows("train", 60))
    text = text * (characters // len(text) + 1)
    turns = [
        {"role": "user", "content": "Repeat."},
        {"role": "assistant", "content": text[:characters]},
    ]
    rows = [{"messages": [{**turns[0], "content": f"Repeat {i}."}, turns[1]]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_large_recipes_fit_the_devices_they_name(
    tmp_path: Path, tiny_model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, memory, num_devices, sizes = MODELS[name]
    model = config_only(tmp_path / "model", tiny_model, kind, sizes)
    rows = long_rows(tmp_path / "rows.jsonl", 8000)
    changes = [f"model={model}", f"data.train={rows}", "data.validation=0.2"]
    changes += ["data.overlong=truncate", "train.warmup_steps=0", f"run={tmp_path / 'run'}"]
    recipe = RECIPES / f"{name}.yaml"
    assert f"--memory {memory}" in recipe.read_text()
    command = ["check", str(recipe), "--memory", memory, "--nproc", num_devices, *changes]
    code = cli.main(command)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "memory" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(RUNS))
def test_small_recipes_run(tmp_path: Path, tiny_model: Path, name: str) -> None:
    changes = [f"model={tiny_model}", f"run={tmp_path / 'run'}", "train.steps=2"]
    changes += ["train.warmup_steps=0", "train.micro_batch_tokens=1024"]
    export = EXPORTS.get(name, "adapter")
    changes += [f"export=[{export}]"]
    changes += ["data.max_length=512", "evaluate.loss_rows=4", "train.batch_size=4"]
    changes += ["train.decay_steps=1"] if name == "pretrain" else []
    changes += (
        ["evaluate.answer_rows=2", "evaluate.max_new_tokens=2"]
        if name in ("quickstart", "low-bits")
        else []
    )
    changes += ["quant.calibration.tokens=2048"] if name == "low-bits" else []
    assert cli.main(["train", str(RECIPES / f"{name}.yaml"), *changes]) == 0
    assert (tmp_path / "run/report.html").is_file()
    assert [path.name for path in (tmp_path / "run/export").iterdir()] == [export]
