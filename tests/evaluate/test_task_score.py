import pytest

from qtune.evaluate.task_score import Graded, TaskScore, against

ACC = TaskScore(task="t", metric="acc", value=0.75, standard_error=0.25, num=4)
NORM = TaskScore(task="t", metric="acc_norm", value=0.5, standard_error=0.25, num=4)


def test_rows_are_compared_with_those_of_the_same_metric():
    trained = [Graded(NORM, (0, 0, 1, 1)), Graded(ACC, (0, 0, 0, 0))]
    acc, norm = against([Graded(ACC, (1, 1, 1, 0)), Graded(NORM, (0, 0, 1, 1))], trained)
    # three questions more right, by one of two ways out of 8
    assert acc.p_value == pytest.approx(2 / 8) and norm.p_value == 1
    assert (acc.value, acc.standard_error, acc.num) == (0.75, 0.25, 4)


@pytest.mark.parametrize("trained", [[], [Graded(ACC, ())], [Graded(ACC, (1, 1))]])
def test_what_was_not_asked_the_same_is_not_compared(trained):
    assert against([Graded(ACC, (1, 1, 1, 0))], trained) == (ACC,)
