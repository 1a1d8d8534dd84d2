"""The quickstart's data: expense messages in free text and the same expense as one line of JSON.

Made here, from seeded draws over `demo_phrases.py`, so that a first run needs no download and the
answer can be checked exactly. Every field is in the text: dates and amounts are rewritten, the
currency and the category are inferred, people and project are copied (null or [] when absent), and
some sentences must be ignored. Splits share no sentence pattern.

`python -m qtune.data.demo FOLDER` writes train.jsonl, validation.jsonl and test.jsonl.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qtune.data import demo_phrases as words
from qtune.data.demo_phrases import Phrases, Split
from qtune.files import write_text

SIZES: dict[Split, int] = {"train": 4000, "validation": 200, "test": 300}
SYSTEM_PROMPT = "Reply with the expense as JSON."

T = TypeVar("T")


class Draw:
    """Seeded draws built on `Random.random` alone: the one method Python promises not to change."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def below(self, stop: int) -> int:
        """An integer from 0 to stop - 1."""
        return int(self._random() * stop)

    def chance(self, share: float) -> bool:
        """True in this share of the calls."""
        return self._random() < share

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def distinct(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different choices, in the order drawn."""
        left = list(choices)
        return [left.pop(self.below(len(left))) for _ in range(count)]


@dataclass(frozen=True)
class Written:
    """A value as the message spells it and as the answer must give it."""

    text: str
    value: Any


@dataclass(frozen=True)
class Expense:
    """One draw: the fields of the answer, and what the message mentions beside them."""

    what: Written
    when: Written
    money: Written
    currency: str
    people: list[str]
    project: str | None
    receipt: bool | None
    bystander: str
    other_money: str
    number: int

    def answer(self) -> str:
        """The line of JSON the model must give; a receipt nobody mentions counts as none."""
        return json.dumps(
            {
                "date": self.when.value,
                "amount": self.money.value,
                "currency": self.currency,
                "category": self.what.value,
                "people": self.people,
                "project": self.project,
                "receipt": self.receipt is True,
            }
        )


def rows(split: Split, count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """`count` conversations `{"messages": [system, user, assistant]}` of a split, none twice.

    A shorter list is the beginning of a longer one. The count defaults to `SIZES[split]`.
    """
    draw = Draw(f"qtune demo {split} {seed}")
    wanted = SIZES[split] if count is None else count
    answers: dict[str, str] = {}
    while len(answers) < wanted:
        expense = _expense(draw, split)
        answers.setdefault(_request(draw, expense, words.PHRASES[split]), expense.answer())
    return [_conversation(request, answer) for request, answer in answers.items()]


def write(folder: Path, seed: int = 0) -> list[Path]:
    """Write one JSONL file per split into the folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in SIZES:
        path = folder / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split, seed=seed)]
        write_text(path, "".join(lines))
        paths.append(path)
    return paths


def _conversation(request: str, answer: str) -> dict[str, Any]:
    turns = (("system", SYSTEM_PROMPT), ("user", request), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _expense(draw: Draw, split: Split) -> Expense:
    names = words.NAMES + words.TEST_NAMES if split == "test" else words.NAMES
    *people, bystander = draw.distinct(names, draw.pick((0, 0, 0, 1, 1, 1, 2, 2, 3)) + 1)
    currency = draw.pick(tuple(words.CURRENCIES))
    return Expense(
        what=_item(draw, split),
        when=_date(draw),
        money=_money(draw, currency),
        currency=currency,
        people=people,
        project=_project(draw) if draw.chance(0.5) else None,
        receipt=draw.pick((True, False, None)),
        bystander=bystander,
        other_money=_money(draw, currency).text,
        number=10 + draw.below(990),
    )


def _request(draw: Draw, expense: Expense, phrases: Phrases) -> str:
    """The message: a main sentence, sentences with further fields, sentences to be ignored."""
    listed = _list(draw, expense.people)
    people, people_sentence = _placed(draw, phrases.people_inline, phrases.people_sentence, listed)
    project, project_sentence = _placed(
        draw, phrases.project_inline, phrases.project_sentence, expense.project
    )
    slots = {
        "what": expense.what.text,
        "What": _capital(expense.what.text),
        "when": expense.when.text,
        "money": expense.money.text,
        "with": people,
        "project": project,
    }
    main = draw.pick(phrases.frames).format_map(slots)
    receipt = _receipt(draw, phrases, expense.receipt)
    noise = _noise(draw, phrases, expense)
    return _join(draw, main, [*people_sentence, *project_sentence, *receipt, *noise])


def _placed(
    draw: Draw, inline: Sequence[str], sentences: Sequence[str], value: str | None
) -> tuple[str, list[str]]:
    """The value as part of the main sentence or as a sentence of its own; nothing for no value."""
    if not value:
        return "", []
    slots = {"people": value, "code": value}
    if draw.chance(0.5):
        return draw.pick(inline).format(**slots), []
    return "", [draw.pick(sentences).format(**slots)]


def _receipt(draw: Draw, phrases: Phrases, receipt: bool | None) -> list[str]:
    if receipt is None:
        return []
    return [draw.pick(phrases.receipt if receipt else phrases.no_receipt)]


def _noise(draw: Draw, phrases: Phrases, expense: Expense) -> list[str]:
    """Sentences that change no field."""
    chosen = []
    if not expense.people and draw.chance(0.2):
        chosen.append(draw.pick(phrases.alone))
    if expense.project is None and draw.chance(0.2):
        chosen.append(draw.pick(phrases.no_project))
    if draw.chance(0.4):
        slots = {
            "number": expense.number,
            "name": expense.bystander,
            "money": expense.other_money,
        }
        chosen.append(draw.pick(phrases.noise).format_map(slots))
    return chosen


def _join(draw: Draw, main: str, extra: list[str]) -> str:
    """The main sentence with the others around it, most of them behind."""
    before: list[str] = []
    behind: list[str] = []
    for sentence in draw.distinct(extra, len(extra)):
        (before if draw.chance(0.25) else behind).append(sentence)
    return " ".join(_capital(part) for part in [*before, main, *behind])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _item(draw: Draw, split: Split) -> Written:
    category = draw.pick(tuple(words.ITEMS))
    common, only_test, places = words.ITEMS[category]
    pool = only_test if split == "test" and draw.chance(0.15) else common
    vendor = f"{draw.pick(words.VENDOR_FIRST)} {draw.pick(words.VENDOR_LAST)}"
    place = draw.pick(places).format(vendor=vendor, city=draw.pick(words.CITIES))
    return Written(draw.pick(pool) + place, category)


def _money(draw: Draw, currency: str) -> Written:
    low, high = draw.pick(((4, 99), (10, 99), (100, 999), (100, 999), (1000, 4999)))
    cents = 100 * (low + draw.below(high - low + 1))
    if draw.chance(0.5):
        cents += 1 + draw.below(99)
    whole, rest = divmod(cents, 100)
    digits = f"{whole:,}" if draw.chance(0.7) else f"{whole}"
    amount = f"{digits}.{rest:02d}" if rest else digits
    text = draw.pick(words.CURRENCIES[currency]).format(amount=amount)
    return Written(text, cents / 100 if rest else whole)


def _date(draw: Draw) -> Written:
    year, month, day = 2024 + draw.below(4), draw.below(12) + 1, draw.below(28) + 1
    name = words.MONTHS[month - 1]
    teen = 10 < day < 20
    ordinal = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    text = draw.pick(words.DATES).format(
        year=year,
        month=name,
        short=name[:3],
        day=day,
        ordinal=ordinal,
        mm=f"{month:02d}",
        dd=f"{day:02d}",
    )
    return Written(text, f"{year}-{month:02d}-{day:02d}")


def _project(draw: Draw) -> str:
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    return f"{draw.pick(letters)}{draw.pick(letters)}-{10 + draw.below(90)}"


def _list(draw: Draw, people: list[str]) -> str:
    if len(people) < 2:
        return "".join(people)
    last = draw.pick((" and ", " and ", " & ", ", "))
    if last == " and " and len(people) > 2 and draw.chance(0.5):
        last = ", and "
    return ", ".join(people[:-1]) + last + people[-1]


def main() -> None:
    """Write the three files into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Write the demo data as JSONL.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in write(arguments.folder, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
