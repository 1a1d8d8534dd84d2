"""Tasks of attention: each block once, fair shares."""

from itertools import pairwise

import pytest

from qtune_kernels.cpu.attention_schedule import NO_WINDOW, Task, _cost, schedule


def shares(plan) -> list[list[Task]]:
    tasks, starts = [Task(*row) for row in plan.tasks.tolist()], plan.starts.tolist()
    return [tasks[a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize("workers", [1, 2, 7, 40])
@pytest.mark.parametrize("run", [2, 1000])
def test_every_block_of_every_head_is_done_once(run: int, workers: int) -> None:
    lengths, heads = (1, 32, 33, 200), range(0, 6, 3)
    plan = schedule(lengths, heads, NO_WINDOW, run, workers)
    assert plan.most_blocks == 7 and len(plan.starts) == workers + 1
    done = [
        (task.row, task.length, task.head, block)
        for share in shares(plan)
        for task in share
        for block in range(task.first, task.stop)
    ]
    blocks = [(0, 1, 1), (1, 32, 1), (33, 33, 2), (66, 200, 7)]
    expected = [
        (row, length, head, block)
        for row, length, count in blocks
        for head in heads
        for block in range(count)
    ]
    assert sorted(done) == sorted(expected)


@pytest.mark.parametrize("window", [NO_WINDOW, 100])
def test_shares_are_fair(window: int) -> None:
    plan = schedule((2000, 100, 300, 900, 30, 30), range(4), window, 16, 4)
    costs = [sum(_cost(task, window) for task in share) for share in shares(plan)]
    assert max(costs) < 1.1 * sum(costs) / len(costs)
