import json

from qtune.report import files, headline
from qtune.report.numbers import SPACE


def said(run):
    return headline.sentence(files.read(run)).replace(SPACE, " ")


def told(run):
    return {name: value.replace(SPACE, " ") for name, value, _ in headline.facts(files.read(run))}


def rewrite(run, **changes):
    table = run.read("eval.json")
    table["rows"] = [row | changes for row in table["rows"]]
    run.write("eval.json", table)


def test_a_finished_run_says_what_changed_in_which_time_at_which_size(finished):
    assert said(finished) == (
        "JSON match 0 % → 93 % on 100 unseen requests; 7 minutes of training; "
        "135.8 MB instead of 269.1 MB."
    )


def test_without_answers_the_losses_are_compared(finished):
    rewrite(finished, exact_match=None, answers=0)
    assert said(finished).startswith("Held-out loss 2.631 → 0.058 over 2,893 tokens; ")


def test_a_run_on_preferences_tells_how_many_it_judges_rightly(finished):
    rewrite(finished, exact_match=None, answers=0)
    path = finished.path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    judged = [
        line | ({"held_out_accuracy": 0.876} if "held_out_loss" in line else {"margin": 0.2})
        for line in lines
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in judged))
    assert said(finished).startswith("88 % of held-out rows judged rightly; ")


def test_the_trained_model_is_the_row_that_the_table_names(finished):
    table = finished.read("eval.json")
    finished.write("eval.json", table | {"trained": "merged onto dequantized"})
    assert "0 % → 92 %" in said(finished)


def test_a_run_that_only_trained_tells_its_training_loss(trained):
    metrics = files.read(trained).training
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    expected = f"Training loss {first:.3f} → {last:.3f} in 90 steps; 7 minutes of training."
    assert said(trained) == expected


def test_a_run_that_has_not_begun_says_so(trained):
    (trained.path / "metrics.jsonl").unlink()
    assert said(trained) == "Nothing has been trained yet."
    assert list(told(trained)) == ["Trained parameters"]


def test_facts_are_the_figures_of_the_files(trained):
    assert told(trained) == {
        "Trained parameters": "4.88 million",
        "Training time": "7 minutes",
        "Tokens read": "171 thousand",
        "Peak memory": "1.30 GiB",
    }
