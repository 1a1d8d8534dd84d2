import os
import shutil

import pytest

from qtune import run_folder
from qtune.errors import UserError
from qtune.run_folder import RunFolder, check, check_disk, create, open_run


def test_a_run_opens_as_it_was_created(tiny_recipe):
    recipe = tiny_recipe()
    check(recipe, resume=False)
    assert create(recipe) == open_run(recipe.run) == RunFolder(recipe.run, recipe)
    assert [path.name for path in recipe.run.iterdir()] == ["recipe.yaml"]


def test_an_empty_folder_is_free_and_another_is_not(tiny_recipe, tmp_path):
    recipe = tiny_recipe(run=tmp_path / "a")
    recipe.run.mkdir()
    check(recipe, resume=False)
    (recipe.run / "x").touch()
    (tmp_path / "a-2").mkdir()
    with pytest.raises(UserError, match=r"a exists: .*--resume.*run=.*a-3"):
        check(recipe, resume=False)


def test_a_run_is_resumed_by_the_same_recipe_only(tiny_recipe):
    recipe = tiny_recipe()
    with pytest.raises(UserError, match="nothing to resume"):
        check(recipe, resume=True)
    create(recipe)
    check(recipe, resume=True)
    changed = tiny_recipe(lora={"rank_pattern": {"q_proj": 2}}, train={"lr": 1.0})
    with pytest.raises(UserError) as error:
        check(changed, resume=True)
    assert "lora.rank_pattern.q_proj: None -> 2; train.lr: 0.01 -> 1.0" in str(error.value)
    assert "--allow lora.rank_pattern.q_proj train.lr, or" in str(error.value)


def test_changes_that_are_allowed_by_name(tiny_recipe):
    create(tiny_recipe())
    changed = tiny_recipe(train={"lr": 1.0, "steps": 9}, export=())
    with pytest.raises(UserError, match=r"changed \(train\.steps: 4 -> 9\)"):
        check(changed, resume=True, allow=["train.lr"])
    assert check(changed, resume=True, allow=["train.lr", "train.steps"]) == [
        "train.lr",
        "train.steps",
    ]
    assert check(changed, resume=True, allow=["train"]) == ["train.lr", "train.steps"]
    # what changes nothing of the training needs no name
    assert check(tiny_recipe(export=(), log={"every": 5}), resume=True) == []


def test_names_to_allow_are_checked(tiny_recipe):
    with pytest.raises(UserError, match=r"--allow train\.lrr: no such key"):
        check(tiny_recipe(), resume=True, allow=["train.lrr"])
    with pytest.raises(UserError, match="--allow is for --resume"):
        check(tiny_recipe(), resume=False, allow=["train.lr"])


def test_files_are_whole_or_as_they_were(tiny_recipe, monkeypatch):
    run = create(tiny_recipe())
    assert run.read("x.json") is None
    run.write("x.json", {"text": "ä"})
    with pytest.raises(TypeError):
        run.write("x.json", {"text": object()})
    monkeypatch.setattr(os, "replace", lambda *paths: None)
    assert run.read("x.json") == {"text": "ä"}
    assert {path.name for path in run.path.iterdir()} == {"recipe.yaml", "x.json"}


def test_disk_room_is_asked_of_the_nearest_folder(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path / "not" / "there", 0)
    with pytest.raises(UserError, match=f"disk too small at {tmp_path}: the run writes about"):
        check_disk(tmp_path / "not" / "there", 2 * free)
    usage = shutil.disk_usage(tmp_path)._replace(free=run_folder.DISK_RESERVE)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    check_disk(tmp_path, 0)
    with pytest.raises(UserError):
        check_disk(tmp_path, 1)


def test_what_is_no_run(tmp_path, tiny_recipe):
    with pytest.raises(UserError, match="is no run folder"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="its training has not ended"):
        create(tiny_recipe()).check_trained()


def test_a_trained_run_may_be_measured_otherwise_and_nothing_else(tiny_recipe):
    recipe = tiny_recipe()
    create(recipe)
    opened = open_run(recipe.run, ["evaluate.loss_rows=7", "merge.recovery=0.5"]).recipe
    assert (opened.evaluate.loss_rows, opened.merge.recovery) == (7, 0.5)
    # of this command alone
    assert open_run(recipe.run).recipe == recipe
    with pytest.raises(UserError, match=r"'lora.rank=8': of a run that is trained only evaluate"):
        open_run(recipe.run, ["lora.rank=8"])
