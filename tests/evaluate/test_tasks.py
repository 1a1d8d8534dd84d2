import sys

import pytest

from qtune.errors import UserError
from qtune.evaluate import tasks
from qtune.evaluate.tasks import load_tasks

pytest.importorskip("lm_eval")


def test_tasks_of_files_are_loaded_with_their_rows(task_folder):
    found = load_tasks(("letters", "writing"), task_folder, None)
    assert found.names == ("letters", "writing")
    assert [len(task.eval_docs) for task in found.loaded["tasks"].values()] == [12, 12]


def test_a_file_stands_for_its_folder(task_folder):
    assert load_tasks(("letters",), task_folder / "letters.yaml", None).names == ("letters",)


def test_a_group_has_a_score_of_its_own(task_folder):
    found = load_tasks(("both",), task_folder, None)
    assert found.names == ("both",) and list(found.loaded["tasks"]) == ["letters", "more_letters"]


def test_a_group_without_a_score_stands_for_its_tasks(task_folder, tmp_path):
    for path in task_folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "both.yaml").write_text("group: both\ntask: [letters, more_letters]\n")
    assert load_tasks(("both",), tmp_path, None).names == ("letters", "more_letters")


def test_examples_in_the_prompt(task_folder):
    for shots, expected in ((None, 0), (2, 2)):
        loaded = load_tasks(("writing",), task_folder, shots).loaded
        assert loaded["tasks"]["writing"].get_config("num_fewshot") == expected


def test_the_output_of_the_libraries_is_held_back(task_folder, tmp_path, capfd):
    for path in task_folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    load_tasks(("letters",), tmp_path, None)
    assert capfd.readouterr() == ("", "")


class Known:
    """An index of tasks as that of lm-eval, which takes a while to read."""

    def __init__(self, include_path=None, include_defaults=True):
        names = ["gsm8k", "hellaswag", "humaneval"] if include_defaults else []
        self.all_tasks = names
        self.task_index = {name: type("Entry", (), {"cfg": {}})() for name in names}
        if include_defaults:
            self.task_index["humaneval"].cfg["unsafe_code"] = True

    def load(self, names):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Known)
    load_tasks.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "no task 'gsm8'; did you mean gsm8k?"),
        ("zzzz", "no task 'zzzz' in lm-eval; set evaluate.task_path for one of your own"),
        ("humaneval", "runs programs that the model writes.*HF_ALLOW_CODE_EVAL=1"),
        ("gsm8k", "needs data from the Hugging Face hub.*OfflineModeIsEnabled.*hf download"),
    ],
)
def test_what_cannot_be_run_is_told(known, monkeypatch, name, message):
    monkeypatch.delenv(tasks.CODE, raising=False)
    with pytest.raises(UserError, match=message):
        load_tasks((name,), None, None)


def test_code_is_run_where_it_was_allowed(known, monkeypatch):
    monkeypatch.setenv(tasks.CODE, "1")
    # it gets as far as the data
    with pytest.raises(UserError, match="hub"):
        load_tasks(("humaneval",), None, None)


def test_names_are_looked_up_in_files_first(known, task_folder, monkeypatch):
    monkeypatch.undo()
    reads = []
    monkeypatch.setattr(tasks, "say", reads.append)
    load_tasks(("letters",), task_folder, 3)
    assert reads == []


def test_a_task_of_neither(known, task_folder):
    with pytest.raises(UserError, match=r"no task 'zzzz' in lm-eval; none in .*tasks"):
        load_tasks(("zzzz",), task_folder, None)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        load_tasks(("x",), tmp_path / "none", None)
    with pytest.raises(UserError, match=r"holds no task, that is no \.yaml file"):
        load_tasks(("x",), tmp_path, None)


def test_a_task_that_is_broken(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: /none.jsonl}}\n"
        "test_split: test\noutput_type: generate_until\n"
    )
    with pytest.raises(UserError, match=r"x cannot be loaded: .*none\.jsonl"):
        load_tasks(("x",), tmp_path, None)


def test_without_the_library_it_says_what_to_install(monkeypatch, task_folder):
    load_tasks.cache_clear()
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qtune\[eval\]'"):
        load_tasks(("letters",), task_folder, None)


def test_errors_reach_whoever_called_past_the_quiet():
    with pytest.raises(OSError), tasks.quiet():
        print("held back", file=sys.stderr)
        raise OSError
