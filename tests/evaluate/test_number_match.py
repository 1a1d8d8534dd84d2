from decimal import Decimal

import pytest

from qtune.evaluate.number_match import last_number, same_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", 7),
        ("The answer is 42.", 42),
        ("it costs $1,234.50", "1234.50"),
        ("It is 3, 4 or 5,000", 5000),
        ("1, 2, 3", 3),
        ("about -12 degrees", -12),
        ("\N{MINUS SIGN}5", -5),
        ("-$5", -5),
        ("10-5", 5),
        ("pages 10\N{EN DASH}15", 15),
        ("a share of .75", "0.75"),
        ("25%", 25),
        ("12km", 12),
        ("x2 = 1,000,000 and y3", 1_000_000),
        ("v1.2.3", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("answer", "right"),
    [("so 18.00 dollars", True), ("$18", True), ("18, or is it 19?", False), ("eighteen", False)],
)
def test_numbers_are_compared_by_value(answer, right):
    assert same_number(answer, "9 * 2 = 18\n#### 18") is right


def test_without_a_number_nothing_is_equal():
    assert not same_number("none", "none")
