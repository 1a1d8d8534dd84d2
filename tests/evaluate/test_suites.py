import pytest
import torch

from qtune.errors import UserError
from qtune.evaluate.suites import Suites, check
from qtune.recipe_evaluate import Evaluate


@pytest.fixture
def settings(task_folder, tmp_path):
    """A recipe that asks for everything."""
    pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text("All roads lead to Rome, it is said. " * 4)
    (tmp_path / "prompts.txt").write_text("How far?\nWhy?\n")
    return Evaluate(
        tasks=("letters",),
        task_path=task_folder,
        task_limit=8,
        perplexity=tmp_path / "text.txt",
        perplexity_context=64,
        prompts=tmp_path / "prompts.txt",
        max_new_tokens=3,
    )


def test_all_that_the_recipe_names_is_measured(settings, model, tokenizer):
    suites = Suites(settings, tokenizer)
    trained = suites.measure("trained", model, keep=True)
    assert [(s.task, s.metric, s.p_value) for s in trained["tasks"]] == [
        ("letters", "acc", None),
        ("letters", "acc_norm", None),
    ]
    assert trained["text"].file == "text.txt" and trained["text"].context == 64
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    changed = suites.measure("changed", model)
    assert all(0 < score.p_value <= 1 for score in changed["tasks"])
    assert changed["text"].nats != trained["text"].nats
    assert changed["text"].bytes == trained["text"].bytes
    assert list(suites.prompts.answers) == ["trained", "changed"]
    assert all(len(texts) == 2 for texts in suites.prompts.answers.values())


def test_what_it_does_not_name_is_not_measured(model, tokenizer):
    suites = Suites(Evaluate(), tokenizer)
    assert suites.measure("m", model, keep=True) == {} and suites.prompts is None


@pytest.mark.parametrize("word", ["perplexity", "prompts"])
def test_a_missing_file_is_told_before_any_model_is_there(tmp_path, word):
    settings = Evaluate(**{word: tmp_path / "none.txt"})
    with pytest.raises(UserError, match=r"none\.txt"):
        check(settings)
    check(Evaluate())
