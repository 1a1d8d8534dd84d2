from qtune.report import files


def test_a_run_that_has_only_trained_has_the_rest_empty(trained):
    found = files.read(trained)
    assert len(found.training) == 90 and len(found.held_out) == 3
    assert found.evaluation is None and found.environment is None and found.merge is None
    assert found.samples == [] and found.exports == []
    assert found.recipe is not None and "demo:train" in found.recipe
    assert found.peak_bytes == max(line["peak_memory_bytes"] for line in found.training)


def test_everything_of_a_finished_run_is_read(finished):
    found = files.read(finished)
    assert [export["folder"] for export in found.exports] == ["adapter", "bf16", "qtune"]
    assert len(found.samples) == 3
    assert found.evaluation["merge"].items() <= found.merge.items()
    assert len(found.merged_layers) == 60 and len(found.prompts) == 2


def test_layers_without_a_choice_leave_that_to_the_table(finished):
    layers = finished.read("merge.json")["layers"]
    finished.write("merge.json", layers)
    found = files.read(finished)
    assert found.merged_layers == layers and found.merge == found.evaluation["merge"]


def test_rows_of_an_earlier_release_have_what_was_not_measured_then(finished):
    table = finished.read("eval.json")
    old = {key: value for key, value in table["rows"][0].items() if key not in files.NOT_MEASURED}
    finished.write("eval.json", table | {"rows": [old]})
    (row,) = files.read(finished).evaluation["rows"]
    assert row == files.NOT_MEASURED | old and row["tasks"] == []


def test_the_file_of_the_merge_goes_before_the_table(finished):
    finished.write("merge.json", {"chosen": "dequantized", "why": "measured again"})
    assert files.read(finished).merge["chosen"] == "dequantized"


def test_an_export_that_is_being_written_is_none(finished):
    (finished.exports / "adapter").rename(finished.exports / ".adapter.partial")
    assert [export["folder"] for export in files.read(finished).exports] == ["bf16", "qtune"]


def test_a_run_without_figures_has_no_peak(trained):
    (trained.path / "metrics.jsonl").unlink()
    assert files.read(trained).peak_bytes is None
