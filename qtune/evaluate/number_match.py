"""Whether two texts end on the same number, as answers to arithmetic problems are compared.

GSM8K (arXiv 2110.14168) writes its answer behind the working, as do models: the last number of a
text is its answer. Commas between thousands, a currency sign in front and zeros behind the decimal
point do not count.
"""

import re
from decimal import Decimal

# the comma of "3, 4" parts numbers, that of "3,400" does not; a word such as x2 is no number
NUMBER = re.compile(
    r"(?<![\w.])[-\N{MINUS SIGN}]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)"
)


def last_number(text: str) -> Decimal | None:
    """The last number written in digits; None where there is none."""
    found = NUMBER.findall(text)
    if not found:
        return None
    plain = found[-1].replace(",", "").replace("$", "").replace("\N{MINUS SIGN}", "-")
    return Decimal(plain)


def same_number(answer: str, reference: str) -> bool:
    """Whether the last numbers of both texts are equal; one without a number equals none."""
    number = last_number(reference)
    return number is not None and last_number(answer) == number
