"""The table of results says what the rows say."""

from typing import Any

from qtune.export.folder.card_table import results

ROW: dict[str, Any] = {
    "loss": 1.25,
    "perplexity": 3.4903,
    "tokens": 100,
    "kl": 0.0012,
    "top1": 0.98,
    "exact_match": 0.5,
    "answers": 10,
    "size_bytes": 1500,
}


def table(this: dict[str, Any], trained: dict[str, Any], base: Any = None) -> list[str]:
    return results({"results": {"this": this, "trained": trained, "base": base}}).splitlines()


def test_figures_are_those_of_the_rows() -> None:
    figures = {"nats": 0.05, "standard_error": 0.01, "recovery": 0.97, "metric": "json_match"}
    lines = table(
        ROW | {"interval": [0.237, 0.763]} | figures,
        ROW | {"kl": None, "top1": None, "loss": 1.2, "perplexity": None},
    )
    (mine,) = (line for line in lines if line.startswith("| **this export**"))
    assert mine == (
        "| **this export** | 1.2500 | +0.0500 ± 0.0196 | 3.490 | 0.0012 | 98.0% | 97.0% "
        "| 50.0% (23.7% to 76.3%) | 1.5 kB |"
    )
    assert "| trained model | 1.2000 |  |  |  |  |  | 50.0% | 1.5 kB |" in lines
    assert not any(line.startswith("| base |") for line in lines)
    assert any("Score: json_match of 10 answers." in line for line in lines)


def test_scores_of_tasks_stand_beside_each_other() -> None:
    score = {"task": "mmlu", "metric": "acc", "value": 0.25, "standard_error": 0.01}
    bare = score | {"value": 0.5, "standard_error": None}
    lines = table(ROW | {"tasks": [score]}, ROW | {"tasks": [bare]}, ROW)
    assert "| task | metric | **this export** | trained model | base |" in lines
    assert lines[-1] == "| mmlu | acc | 0.2500 ± 0.0196 | 0.5000 |  |"


def test_no_rows_and_no_answers() -> None:
    assert "was not measured" in results({"results": None})
    lines = table(ROW | {"exact_match": None, "answers": 0}, ROW | {"answers": 0})
    assert not any("Score:" in line for line in lines)
