"""Recipes and tasks in recipes/eval: they load, and what needs no network is asked."""

import json
from pathlib import Path

import pytest

from qtune import recipe_yaml
from qtune.evaluate.prompts import read_prompts

EVAL = Path(__file__).parents[2] / "recipes/eval"


@pytest.mark.parametrize("name", ["hub", "offline"])
def test_recipes_are_whole_and_point_editors_to_the_schema(name: str) -> None:
    path = EVAL / f"{name}.yaml"
    assert path.read_text().startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    recipe = recipe_yaml.load(path)
    assert recipe.evaluate.tasks
    # the two files that it names, from the folder of the repository
    for found in (recipe.evaluate.task_path, recipe.evaluate.prompts):
        assert found is None or (EVAL.parents[1] / found).exists()


def test_prompts_are_read() -> None:
    rows = read_prompts(EVAL / "prompts.yaml")
    assert [len(row.messages) for row in rows] == [3, 2, 2]
    assert json.loads(rows[0].messages[-1]["content"])["people"] == ["Ada"]


def test_benchmarks_of_the_hub_are_known_to_the_harness() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(tasks.__file__).parent
    for name in recipe_yaml.load(EVAL / "hub.yaml").evaluate.tasks:
        manager = tasks.TaskManager(include_path=str(folder / name), include_defaults=False)
        assert name in manager.all_tasks


def test_tasks_without_a_network_have_rows_and_are_graded() -> None:
    pytest.importorskip("lm_eval")
    from qtune.evaluate.tasks import load_tasks

    found = load_tasks(("expenses", "expenses_choice"), EVAL / "tasks", None).loaded["tasks"]
    rows = list(found["expenses"].eval_docs)
    assert len(rows) == 400 and json.loads(rows[0]["answer"])["currency"]
    wrong = json.dumps(json.loads(rows[0]["answer"]) | {"currency": "XYZ"})
    right = found["expenses"].process_results(rows[0], [rows[0]["answer"]])
    assert right == {"json_match": 1, "json_fields": 1}
    graded = found["expenses"].process_results(rows[0], [wrong])
    assert graded == {"json_match": 0, "json_fields": pytest.approx(6 / 7)}
    choice = next(iter(found["expenses_choice"].eval_docs))
    assert found["expenses_choice"].doc_to_choice(choice) == [rows[0]["answer"], rows[1]["answer"]]
