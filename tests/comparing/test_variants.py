import pytest

from qtune.comparing.variants import variants
from qtune.errors import UserError
from qtune.recipe import Quant


def names(*arguments):
    return [it.name for it in variants(*arguments)]


def test_all_combinations_come_behind_the_16_bit_model(tiny_recipe):
    found = variants(
        tiny_recipe(), ["nf4", "int3"], ["nearest", "gptq", "gptq+rotate"], ["zero", "cloq"]
    )
    assert [it.name for it in found] == [
        *("16-bit", "nf4", "nf4 cloq", "nf4 gptq", "nf4 gptq cloq"),
        *("nf4 gptq+rotate", "nf4 gptq+rotate cloq", "int3", "int3 cloq", "int3 gptq"),
        *("int3 gptq cloq", "int3 gptq+rotate", "int3 gptq+rotate cloq"),
    ]
    last = found[-1].recipe
    assert (last.quant.format, last.quant.method, last.quant.rotate) == ("int3", "gptq", True)
    assert last.lora.init == "cloq" and last.lora.rank == tiny_recipe().lora.rank
    assert found[0].recipe.quant.format is None


def test_what_cannot_be_is_left_out_and_said(tiny_recipe, capsys):
    assert names(tiny_recipe(), ["e8p"], ["nearest", "gptq"]) == ["16-bit", "e8p gptq"]
    assert "left out: e8p nearest zero: quant.format: e8p needs" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--methods hqq: there are nearest, gptq"):
        variants(tiny_recipe(), ["nf4"], ["hqq"])


def test_settings_of_the_recipe_are_kept(tiny_recipe):
    recipe = tiny_recipe(quant={"format": "int4", "layers": {"down_proj": "int8"}})
    assert names(recipe, ["int4", "int3"]) == ["16-bit", "int4 mixed", "int3"]
    sized = tiny_recipe(quant={"group_size": 32, "skip": ("k_proj",)})
    _, found = variants(sized, ["int4"])
    assert found.name == "int4 g32" and found.recipe.quant.skip == ("k_proj",)
    # activations of the recipe are for its format alone
    int8 = tiny_recipe(quant={"format": "int8", "activations": "int8"})
    assert variants(int8, ["nf4"])[1].recipe.quant == Quant(format="nf4")
