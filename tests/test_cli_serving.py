"""The verbs for what is served."""

from types import SimpleNamespace

import pytest

from qtune import cli_serving
from qtune.cli import main
from qtune.errors import UserError


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ({"format": "nf4"}, {"bitsandbytes", "onnx", "qtune"}),
        ({"format": "int4_sym"}, {"gptq", "awq", "compressed-tensors-w4a16", "qtune"}),
        ({"format": "int8"}, {"gptq-int8", "gguf-q8_0", "compressed-tensors-w8a16", "qtune"}),
    ],
)
def test_exact_names_what_holds_the_base(tiny_recipe, quant, expected):
    recipe = tiny_recipe(quant=quant)
    chosen = SimpleNamespace(exact=True, to=None)
    assert expected <= set(cli_serving.names(chosen, recipe))
    assert not {"bf16", "adapter", "gguf-q4_k_m"} & set(cli_serving.names(chosen, recipe))


def test_without_a_quantized_base_no_export_is_exact(tiny_recipe):
    with pytest.raises(UserError, match="no export holds exactly"):
        cli_serving.names(SimpleNamespace(exact=True, to=None), tiny_recipe(quant={"format": None}))


def test_names_given_come_before_those_of_the_recipe(tiny_recipe):
    recipe = tiny_recipe(export=("adapter",))
    assert cli_serving.names(SimpleNamespace(exact=False, to=["bf16"]), recipe) == ["bf16"]
    assert cli_serving.names(SimpleNamespace(exact=False, to=None), recipe) == ("adapter",)


@pytest.mark.parametrize(
    "arguments",
    [["verify", "nowhere"], ["push", "nowhere", "a/b", "--dry-run"]],
)
def test_a_folder_that_is_no_export_is_an_error(arguments, capsys):
    assert main(arguments) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["serve-check", "http://127.0.0.1:9", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
