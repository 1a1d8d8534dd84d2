import pytest

from qtune.report import numbers
from qtune.report.numbers import DASH, SPACE


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.decimal(0.05834), "0.0583"),
        (numbers.decimal(1234.5, 1), "1,234.5"),
        (numbers.decimal(0.0), "0.0000"),
        (numbers.decimal(1.2e-6), "< 0.0001"),
        (numbers.decimal(6e-5), "0.0001"),
        (numbers.percent(0.93), "93 %"),
        (numbers.percent(0.9931, 1), "99.3 %"),
        (numbers.score(0.93, 100), "93 %"),
        (numbers.score(299 / 300, 300), "99.7 %"),
        (numbers.whole(12345), "12,345"),
        (numbers.short(950), "950"),
        (numbers.short(4_884_480), "4.88 million"),
        (numbers.short(7_240_000_000), "7.24 billion"),
        (numbers.disk(269_060_552), "269.1 MB"),
        (numbers.disk(14_500_000_000), "14.5 GB"),
        (numbers.disk(19_571_304, 14_500_000_000), "0.0 GB"),
        (numbers.memory(3 * 2**29), "1.50 GiB"),
        (numbers.memory(2**20), "1.0 MiB"),
        (numbers.memory(3 * 2**29, 2**31), "1,536.0 MiB"),
        (numbers.memory(3 * 2**29, 2**35), "1.50 GiB"),
        (numbers.memory(2**20, 2**35), "0.00 GiB"),
        (numbers.duration(48.2), "48 seconds"),
        (numbers.duration(441), "7 minutes"),
        (numbers.duration(9000), "2.5 hours"),
    ],
)
def test_numbers_are_shown_as_people_write_them(shown, expected):
    assert shown.replace(SPACE, " ") == expected


def test_what_was_not_measured_is_a_dash():
    unmeasured = (numbers.decimal, numbers.percent, numbers.whole, numbers.disk, numbers.memory)
    assert {show(None) for show in unmeasured} == {DASH} == {numbers.score(None, 0)}
