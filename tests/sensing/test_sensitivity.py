from dataclasses import replace

import pytest

from qtune.errors import UserError
from qtune.sensing.sensitivity import VERSION, Header, Sensitivity, read, start

HEADER = Header("model", "gptq", True, 64, "x.txt", "ab12", 2048, 3.25)
ONE = Sensitivity("a.q_proj", "int4", 4096, 2200, 0.01, 0.002, 0.001)


def test_lines_are_there_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "new" / "sense.jsonl"
    made = start(path, HEADER)
    made.add(ONE)
    made.add(replace(ONE, format="int3", divergence=float("nan")))
    found = read(path)
    assert found.header == HEADER and found.found[0] == ONE
    assert found.known == {("a.q_proj", "int4"), ("a.q_proj", "int3")}


def test_it_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "sense.jsonl"
    start(path, HEADER).add(ONE)
    with path.open("a") as file:
        file.write('{"layer": "b.q_pr')
    again = start(path, HEADER)
    assert again.found == [ONE]
    again.add(replace(ONE, layer="b.q_proj"))
    assert read(path).known == {("a.q_proj", "int4"), ("b.q_proj", "int4")}


def test_another_measurement_is_refused(tmp_path):
    path = tmp_path / "sense.jsonl"
    start(path, HEADER)
    with pytest.raises(UserError, match=r"another measurement \(method: gptq, not nearest\)"):
        start(path, replace(HEADER, method="nearest"))


def test_figures_of_another_version_are_refused(tmp_path):
    path = tmp_path / "sense.jsonl"
    start(path, HEADER)
    # as it was before there were versions
    path.write_text(path.read_text().replace(f', "version": {VERSION}', ""))
    with pytest.raises(UserError, match=f"version 1, not {VERSION}.*measure again"):
        read(path)


@pytest.mark.parametrize("text", ["", "x\n", "[1]\n", '{"model": 1}\n'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "sense.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="not a file of qtune sense"):
        read(path)
    with pytest.raises(UserError, match="no such file; `qtune sense MODEL"):
        read(tmp_path / "none")
