import pytest

from qtune.report import evaluation
from qtune.report.files import read


@pytest.fixture
def files(reported):
    return read(reported)


@pytest.fixture
def nothing(trained):
    """A run that was not evaluated."""
    return read(trained)


def test_a_run_that_was_not_evaluated_has_nothing_to_show(nothing):
    assert evaluation.rows(nothing) == [] and evaluation.tokens(nothing) == []
    assert evaluation.suite(nothing) == {} and evaluation.field_table(nothing) == {}
    assert evaluation.quality_charts(nothing, 1000, 300) == {}
    assert list(evaluation.score_charts(nothing, 300)) == []
    assert evaluation.score_title(nothing) == "Exact match"


def test_the_gain_is_that_of_the_bases_row(files, measured):
    # of the quantized base, not of the 16-bit one above it
    assert evaluation._gain(files) == pytest.approx(2.7458 - 0.0583)
    half = 1.96 * measured[-1]["standard_error"] / (2.7458 - 0.0583)
    (point,) = [p for p in evaluation._points(files, evaluation._gain(files)) if "gguf" in p.name]
    assert point.half == pytest.approx(half, rel=1e-4) and point.size_mb == 105.4
    assert point.quality == measured[-1]["recovery"] and not point.exact


def test_without_recovery_the_loss_is_drawn(files):
    for row in files.evaluation["rows"]:
        row["recovery"] = None
    assert evaluation._gain(files) is None
    (first, *_) = evaluation._points(files, None)
    assert (first.name, first.quality, first.exact) == ("adapter on nf4", 0.0583, True)
    assert not evaluation.quality_charts(files, 1000, 300)["share"]


def test_one_form_alone_is_no_chart(files):
    files.evaluation["rows"] = files.evaluation["rows"][:3]
    assert evaluation.quality_charts(files, 1000, 300) == {}


def test_scores_of_several_metrics_are_called_scores(files):
    assert evaluation.score_title(files) == "JSON match"
    files.evaluation["rows"][0]["metric"] = "number_match"
    assert evaluation.score_title(files) == "Score"


def test_a_task_that_one_model_was_asked_is_no_chart(files):
    for row in files.evaluation["rows"][1:]:
        row["tasks"] = row["tasks"][:1]
    assert [title for title, _ in evaluation.score_charts(files, 300)] == [
        "gsm8k, exact match (strict-match)"
    ]
    _, *rows = evaluation.suite(files)["rows"]
    assert {cells[-1] for _, cells in rows} == {"\N{EN DASH}"}
