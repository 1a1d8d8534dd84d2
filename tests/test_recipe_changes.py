import pytest

from qtune.errors import UserError
from qtune.recipe_changes import changes, check_names, covers


def test_changed_keys_are_found_with_old_and_new_value(tiny_recipe):
    before = tiny_recipe()
    now = tiny_recipe(lora={"rank_pattern": {"q_proj": 2}}, train={"lr": 1.0})
    assert changes(before, now) == {
        "lora.rank_pattern.q_proj": "None -> 2",
        "train.lr": "0.01 -> 1.0",
    }
    assert changes(now, now) == {}


FREE = [
    {"log": {"every": 7}},
    {"export": ("bf16",)},
    {"merge": {"base": "original"}},
    {"evaluate": {"answer_rows": 1, "loss_rows": 3}},
    {"data": {"test": None}},
    {"train": {"save_every": 1, "keep": 9, "eval_every": 3}},
]


@pytest.mark.parametrize("fields", FREE, ids=str)
def test_what_changes_nothing_of_the_training_may_change(tiny_recipe, fields):
    assert changes(tiny_recipe(), tiny_recipe(**fields)) == {}


@pytest.mark.parametrize("watch", [{"keep_best": True}, {"patience": 3}])
def test_held_out_losses_count_where_the_run_goes_by_them(tiny_recipe, watch):
    before = tiny_recipe(train=watch)
    now = tiny_recipe(train={**watch, "eval_every": 1}, evaluate={"loss_rows": 2})
    assert list(changes(before, now)) == ["evaluate.loss_rows", "train.eval_every"]


def test_names_are_keys_or_sections(tiny_recipe):
    recipe = tiny_recipe()
    check_names(["train", "train.lr", "lora.rank_pattern", "train.preference.beta"], recipe)
    with pytest.raises(
        UserError, match=r"--allow train.lrr: no such key.*did you mean train\.lr\?"
    ):
        check_names(["train.lrr"], recipe)
    with pytest.raises(UserError, match=r"no such key in a recipe$"):
        check_names(["zzzz"], recipe)


def test_a_section_covers_its_keys():
    assert covers(["train"], "train.lr") and covers(["train.lr"], "train.lr")
    assert not covers(["train.lr"], "train.lr_scale") and not covers([], "train.lr")
