import json

import pytest

from qtune import recipe_yaml
from qtune.cli import main


@pytest.fixture
def configuration(tmp_path):
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 256,
    }
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(sizes))
    return path


def test_a_plan_needs_a_configuration_only(configuration, tmp_path, capsys):
    out = tmp_path / "fragment.yaml"
    given = [str(configuration), "--memory", "1GB", "--context", "128", "--serve"]
    assert main(["plan", *given, "--formats", "int4", "nf4", "--out", str(out)]) == 0
    assert "int4" in capsys.readouterr().out
    assert "quant:" in out.read_text()


def test_a_memory_that_is_no_size(configuration, capsys):
    assert main(["plan", str(configuration), "--memory", "much"]) == 2
    assert "not a size" in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_says_the_least(configuration, capsys):
    assert main(["plan", str(configuration), "--memory", "1KB", "--context", "128"]) == 2
    assert "error: " in capsys.readouterr().err


def test_sense_needs_text(tiny_model, tmp_path, capsys):
    missing = tmp_path / "no.txt"
    assert main(["sense", str(tiny_model), "--text", str(missing)]) == 2
    assert "no.txt" in capsys.readouterr().err


def test_compare_writes_a_table(tiny_recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml.dump(tiny_recipe()))
    out = tmp_path / "compared"
    assert main(["compare", str(path), "--formats", "nf4", "int2", "--out", str(out)]) == 0
    table = (out / "compare.md").read_text()
    assert "| nf4 |" in table and "| int2 |" in table
    assert (out / "compare.png").stat().st_size > 1000


def test_compare_refuses_unknown_words(tiny_recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml.dump(tiny_recipe()))
    assert main(["compare", str(path), "--formats", "nf5"]) == 2
    assert "unknown format 'nf5'" in capsys.readouterr().err
    assert main(["compare", str(path), "--formats", "nf4", "--methods", "gtpq"]) == 2
    assert "there are nearest" in capsys.readouterr().err


def test_overrides_may_stand_behind_a_list(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: {train: d}\ntrain: {steps: 1}\nrun: r\n")
    assert main(["compare", str(recipe), "--formats", "int4", "lora.rnak=8"]) == 2
    assert "unknown key 'rnak'" in capsys.readouterr().err
