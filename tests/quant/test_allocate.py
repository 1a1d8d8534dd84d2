import random
from itertools import product

import pytest

from qtune.errors import UserError
from qtune.quant import allocate as module
from qtune.quant.allocate import Option, allocate


def problem(seed, layers=6, formats=4):
    """Layers of three sizes whose losses are no simple function of bytes."""
    draw = random.Random(seed)
    made = {}
    for number in range(layers):
        weights = draw.choice([64, 96, 512])
        made[f"layer{number}"] = [
            Option(f"b{bits}", weights * bits + 8, draw.random() * weights / 4**bits)
            for bits in range(2, 2 + formats)
        ]
    return made


def brute_force(options, budget):
    """The least loss of all choices within the budget."""
    fitting = [
        sum(option.loss for option in choice)
        for choice in product(*options.values())
        if sum(option.size_bytes for option in choice) <= budget
    ]
    return min(fitting)


def budgets(options):
    least = sum(min(o.size_bytes for o in choices) for choices in options.values())
    most = sum(max(o.size_bytes for o in choices) for choices in options.values())
    return [least + (most - least) * part // 7 for part in range(9)]


@pytest.mark.parametrize("seed", range(8))
def test_small_cases_are_solved_exactly(seed):
    options = problem(seed)
    for budget in budgets(options):
        found = allocate(options, budget)
        assert found.loss == pytest.approx(brute_force(options, budget))
        assert found.size_bytes <= budget
        assert found.bound <= found.loss + 1e-12
        taken = [next(o for o in options[n] if o.format == f) for n, f in found.formats.items()]
        assert sum(option.size_bytes for option in taken) == found.size_bytes
        assert list(found.formats) == list(options)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_choice_is_one_step_from_the_bound(seed, monkeypatch):
    monkeypatch.setattr(module, "MOST_SUMS", 0)
    options = problem(seed, layers=7)
    # no step up a hull saves more than the worst option of the worst layer loses
    largest = max(option.loss for choices in options.values() for option in choices)
    for budget in budgets(options):
        found, best = allocate(options, budget), brute_force(options, budget)
        assert found.size_bytes <= budget
        assert found.bound - 1e-12 <= best <= found.loss + 1e-12 <= found.bound + largest + 1e-12


def test_a_whole_model_is_solved_exactly_in_a_moment():
    draw = random.Random(0)
    sizes = [576 * 576, 192 * 576, 1536 * 576]
    options = {
        str(n): [
            Option(str(bits), sizes[n % 3] * bits // 8, draw.random() * 4.0**-bits)
            for bits in (2, 3, 4, 8)
        ]
        for n in range(210)
    }
    budget = int(3.2 / 8 * sum(sizes) * 70)
    found = allocate(options, budget)
    assert budget * 0.999 < found.size_bytes <= budget
    assert found.bound <= found.loss <= 1.001 * found.bound
    uniform = sum(choices[1].loss for choices in options.values())
    assert found.loss < 0.8 * uniform


def test_an_option_that_loses_more_with_more_bytes_is_not_taken():
    options = {"a": [Option("small", 10, 1.0), Option("worse", 20, 2.0)]}
    assert allocate(options, 1000).formats == {"a": "small"}


def test_a_budget_below_the_minimum_is_refused_with_it():
    options = problem(1)
    least = sum(min(o.size_bytes for o in choices) for choices in options.values())
    assert allocate(options, least).size_bytes == least
    with pytest.raises(UserError, match=rf"at least {least} bytes .* budget is {least - 1}"):
        allocate(options, least - 1)
