import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from qtune import setup
from qtune.errors import UserError
from qtune.model.calibrated import calibrated_place
from qtune.recipe import Calibration
from qtune.run_folder import RunFolder
from qtune.setup import open_setup, stored_base


def write(path, *pairs):
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_recipe_is_opened(tiny_recipe, tiny_model):
    opened = open_setup(tiny_recipe(), Accelerator())
    assert opened.base == tiny_model and opened.device == torch.device("cpu")
    assert len(opened.data.feed.samples) == 12 and len(opened.data.test) == 2
    assert len(opened.data.held_out) == 4
    assert opened.tokenizer.pad_token == "<|endoftext|>"


def test_text_is_there_where_the_base_is_calibrated(tiny_recipe, tiny_model):
    assert open_setup(tiny_recipe(), Accelerator()).text is None
    recipe = tiny_recipe(quant={"method": "gptq", "calibration": Calibration(tokens=300)})
    opened = open_setup(recipe, Accelerator())
    assert opened.text.num_tokens == 300 and opened.text.source == "train"
    # nothing is calibrated by opening
    assert not calibrated_place(tiny_model, recipe, opened.text.sha256).exists()


def test_base_of_a_plain_run_is_the_model(tiny_recipe, tiny_model):
    recipe = tiny_recipe()
    opened = open_setup(recipe, Accelerator())
    assert stored_base(opened, RunFolder(recipe.run, recipe)) == tiny_model


def test_every_process_needs_a_sample(tiny_recipe):
    two = SimpleNamespace(num_processes=5)
    with pytest.raises(UserError, match=r"train.batch_size \(4\) leaves some of the 5 processes"):
        open_setup(tiny_recipe(), two)


def test_the_recipe_may_name_another_template(tiny_recipe, tmp_path):
    template = tmp_path / "shout.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    opened = open_setup(tiny_recipe(data={"template": str(template)}), Accelerator())
    text = opened.tokenizer.decode(opened.data.feed.samples[0].ids)
    assert "ASSISTANT: " in text and "<|im_start|>" not in text


def test_one_process_of_a_machine_tokenises(tiny_recipe, monkeypatch):
    asked = []
    original = setup.prepare

    def prepare(recipe, tokenizer, *, builds):
        asked.append(builds)
        return original(recipe, tokenizer)

    monkeypatch.setattr(setup, "prepare", prepare)
    for first in (True, False):
        process = SimpleNamespace(
            num_processes=2,
            is_local_main_process=first,
            main_process_first=nullcontext,
            device=torch.device("cpu"),
        )
        open_setup(tiny_recipe(), process)
    assert asked == [True, False]


def test_a_configuration_will_do_where_weights_are_not_needed(tiny_recipe, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = tiny_recipe(model=str(folder))
    assert open_setup(recipe, Accelerator(), weights=False).base == folder
    with pytest.raises(UserError, match=r"safetensors"):
        open_setup(recipe, Accelerator())


def test_an_expected_answer_must_be_comparable(tiny_recipe, tmp_path):
    test = write(tmp_path / "t.jsonl", ("one", "1"), ("two", "is two"))
    data = {"test": test}
    with pytest.raises(UserError, match=r"t\.jsonl:2: the expected answer holds no JSON"):
        open_setup(tiny_recipe(data=data), Accelerator())
    # rows that nobody answers may hold what they like
    open_setup(tiny_recipe(data=data, evaluate={"answer_rows": 1}), Accelerator())
    open_setup(tiny_recipe(data=data, evaluate={"metric": "exact_match"}), Accelerator())
