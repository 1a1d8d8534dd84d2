"""What a row is to the loop."""

from qtune.data.sample import Sample


def test_a_pair_counts_both_answers() -> None:
    worse = Sample("r:1", [1, 2, 5], [0, 0, 1])
    pair = Sample("r:1", [1, 2, 3, 4], [0.0, 0.0, 1.0, 0.5], rejected=worse)
    assert pair.parts == (pair, worse)
    assert (pair.num_tokens, pair.num_targets) == (7, 3)
    assert pair.supervised == [False, False, True, True]


def test_perplexity_looks_at_the_chosen_answer_alone() -> None:
    worse = Sample("r:1", [1, 5], [0, 1])
    pair = Sample("r:1", [1, 2], [0, 1], rejected=worse, label=True)
    assert pair.chosen() == Sample("r:1", [1, 2], [0, 1], label=True)
    assert worse.chosen() is worse
