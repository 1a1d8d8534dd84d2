import pytest

from qtune.recompute_choice import choose

GIB = 2**30
SIZES = {"none": 50 * GIB, "cheap": 30 * GIB, "all": 10 * GIB}


@pytest.mark.parametrize(
    ("free", "policy", "reason"),
    [
        (60, "none", "everything fits"),
        # a tenth stays free
        (55, "cheap", "none would fill 50.0 of 55.0 GiB"),
        (33, "all", "cheap would fill 30.0 of 33.0 GiB"),
        # whether the run fits at all is asked elsewhere
        (5, "all", "cheap would fill 30.0 of 5.0 GiB"),
    ],
)
def test_as_little_as_the_memory_allows(free, policy, reason):
    chosen = choose(SIZES, free * GIB, "auto", None)
    assert (chosen.policy, chosen.reason) == (policy, reason)
    assert chosen.total_bytes == SIZES and chosen.saves_most == (policy == "all")


@pytest.mark.parametrize("wanted", SIZES)
def test_the_recipe_is_followed_whatever_is_free(wanted):
    for free in (5, 33, 60):
        for begun in (None, "none", "all"):
            assert choose(SIZES, free * GIB, wanted, begun).policy == wanted


@pytest.mark.parametrize("begun", SIZES)
@pytest.mark.parametrize("free", [50, 60, 500])
def test_a_run_goes_on_as_it_began(begun, free):
    chosen = choose(SIZES, free * GIB, "auto", begun)
    assert (chosen.policy, chosen.reason) == (begun, "the run has begun with it")


@pytest.mark.parametrize(("begun", "free", "policy"), [("none", 40, "cheap"), ("cheap", 12, "all")])
def test_a_run_goes_on_with_less_memory_than_it_began_with(begun, free, policy):
    assert choose(SIZES, free * GIB, "auto", begun).policy == policy


def test_a_model_without_blocks_has_no_choice():
    chosen = choose({"none": 50 * GIB}, 5 * GIB, "auto", None)
    assert (chosen.policy, chosen.reason) == ("none", "the model knows no other")
    assert chosen.saves_most
