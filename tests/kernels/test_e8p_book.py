"""The code book E8P against its definition, searched in full in float64."""

import hashlib
import itertools

import pytest
import torch

from qtune_kernels.e8p_book import (
    LENGTH,
    STEP,
    decode_words,
    nearest_words,
    pattern_words,
    points,
)


@pytest.fixture(scope="module")
def book() -> torch.Tensor:
    """All points, float64 [65536, 8]."""
    return decode_words(torch.arange(1 << 16, dtype=torch.int32)).double() * STEP


def test_there_are_65536_points(book) -> None:
    assert book.shape == (1 << 16, LENGTH) and len(book.unique(dim=0)) == 1 << 16


def test_points_are_shifted_vectors_of_halves_with_an_even_sum(book) -> None:
    shift = torch.where(torch.arange(1 << 16) >> 15 == 1, -0.25, 0.25)
    halves = book - shift[:, None]
    assert torch.equal(halves.abs() % 1, torch.full_like(halves, 0.5))
    assert not (halves.sum(1) % 2).any()


def test_magnitudes_are_the_ball_and_29_of_the_next_shell(book) -> None:
    # the low byte is the pattern, so 256 words tell all of them
    halves = (book[:256] - 0.25).abs()
    found = {tuple(one) for one in halves.tolist()}
    ball = {p for p in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in p) <= 10}
    assert len(ball) == 227 and ball < found and len(found) == 256
    for rest in found - ball:
        assert sorted(rest) == [0.5] * 3 + [1.5] * 5


def test_every_point_is_its_own_nearest(book) -> None:
    words = torch.arange(0, 1 << 16, 7, dtype=torch.int32)
    assert torch.equal(nearest_words(book[words].float()), words)


@pytest.mark.parametrize("deviation", [0.3, 0.9, 1.5, 4.0])
def test_no_point_is_nearer_than_the_one_chosen(deviation, book) -> None:
    vectors = torch.randn(400, LENGTH) * deviation
    # ties of signs, sizes and shifts
    vectors[0], vectors[1], vectors[2] = 0.0, 1.0, torch.tensor([1.0, 0, 0, 0, 0, 0, 0, -1.0])
    chosen = decode_words(nearest_words(vectors)).double() * STEP
    distances = (vectors.double() - chosen).square().sum(1)
    least = torch.cdist(vectors.double(), book).square().amin(1)
    torch.testing.assert_close(distances, least, rtol=1e-6, atol=1e-6)


def test_many_vectors_are_worked_through_in_slices() -> None:
    vectors = torch.randn(9000, LENGTH)
    words = nearest_words(vectors)
    assert torch.equal(words[8990:], nearest_words(vectors[8990:]))
    assert nearest_words(vectors[:0]).shape == (0,)


def test_normal_numbers_lose_as_little_as_published() -> None:
    # shared/QUALITY.md: .092 at 2 bits, where nothing can lose less than .0625
    vectors = torch.randn(20000, LENGTH)
    found = decode_words(nearest_words(vectors * 1.02)) * STEP / 1.02
    assert (found - vectors).square().mean() == pytest.approx(0.0915, abs=0.0015)


def test_what_words_mean_never_changes() -> None:
    stored = points(torch.device("cpu")).numpy().tobytes()
    assert hashlib.sha256(stored).hexdigest()[:16] == "704d21d23b0ed68c"


def test_patterns_for_kernels_are_those_of_the_book(book) -> None:
    words = pattern_words(torch.device("cpu"))
    steps = words[:, None] >> 4 * torch.arange(8) & 14
    magnitudes = (book[:256] - 0.25).abs()
    assert torch.equal(steps * STEP, magnitudes.float())
    assert torch.equal(words & 1, magnitudes.sum(1).int() % 2)
