import pytest
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from qtune.sampling import NUM_ROWS, answers_to_test_rows
from qtune.setup import open_setup


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_the_first_test_rows_are_answered(tiny_recipe, model):
    recipe = tiny_recipe(data={"test": "demo:test?rows=6"}, evaluate={"max_new_tokens": 3})
    setup = open_setup(recipe, Accelerator())
    ask = answers_to_test_rows(setup)
    found = ask(model.train())
    assert model.training and ask(model) == found
    rows = setup.data.test[:NUM_ROWS]
    assert [line["prompt"] for line in found] == [row.messages[-2]["content"] for row in rows]
    assert [line["expected"] for line in found] == [row.messages[-1]["content"] for row in rows]
    assert all(isinstance(line["answer"], str) for line in found)


def test_without_test_rows_nobody_is_asked(tiny_recipe):
    setup = open_setup(tiny_recipe(data={"test": None}), Accelerator())
    assert answers_to_test_rows(setup) is None
