"""Every answer of the demo data is read off its message again, by rules that share no code."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from qtune.data import demo, demo_phrases
from qtune.data.demo import SIZES, Draw, rows, write

SPLITS = tuple(SIZES)
KEYS = ["date", "amount", "currency", "category", "people", "project", "receipt"]

# SHA-256 of the first 20 rows as JSON lines. Other data means other figures in the README.
PINNED = {
    "train": "a6cc862b059041b796820e0505415c45a2a65523fbdf4e9ed6814c01ce1675e1",
    "validation": "6055b486d5ab80c4eb5fc4a2ae6eb5a8af0b1485fee1d0a2b8b927bee4e1b34f",
    "test": "5cdb32c95c4555b0f7cfafdac78f5afae5de82e61fcfdd26e5f226c8db718fa5",
}


@pytest.fixture(scope="module")
def pairs():
    """Per split, (message, answer as written)."""
    return {
        split: [(r["messages"][1]["content"], r["messages"][2]["content"]) for r in rows(split)]
        for split in SPLITS
    }


@pytest.mark.parametrize("split", SPLITS)
def test_first_rows_are_pinned(split):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows(split, 20)]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PINNED[split]


def test_another_process_with_another_hash_seed_gives_the_same():
    code = "import json; from qtune.data.demo import rows; print(json.dumps(rows('test', 30)))"
    for hash_seed in ("0", "1"):
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(printed) == rows("test", 30)


def test_counts_and_seeds():
    assert rows("train", 7) == rows("train", 50)[:7]
    assert len(rows("test")) == SIZES["test"] == 300
    assert rows("train", 5, seed=1) != rows("train", 5)
    assert rows("train", 0) == []


@pytest.mark.parametrize("split", SPLITS)
def test_shape_of_a_row(split):
    for row in rows(split, 50):
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == demo.SYSTEM_PROMPT


def test_no_message_repeats(pairs):
    counts = Counter(message for split in SPLITS for message, _ in pairs[split])
    assert max(counts.values()) == 1
    assert len(counts) == sum(SIZES.values())


def test_messages_are_short(pairs):
    for split in SPLITS:
        lengths = [len(message.split()) for message, _ in pairs[split]]
        assert max(lengths) <= 50
        assert 20 <= sum(lengths) / len(lengths) <= 35


def test_answers_are_strict_one_line_json(pairs):
    for split in SPLITS:
        for _, text in pairs[split]:
            answer = json.loads(text)
            assert json.dumps(answer) == text
            assert list(answer) == KEYS
            assert isinstance(answer["amount"], int | float)
            assert isinstance(answer["receipt"], bool)
            assert re.fullmatch(r"[A-Z]{2}-\d\d", answer["project"] or "XX-00")


def test_templates_leave_no_scar(pairs):
    for split in SPLITS:
        for message, _ in pairs[split]:
            assert not re.search(r"[{}]|  |[,.] ?[,.:;]|\( | \)|^[a-z]|[.!?] [a-z]", message), (
                message
            )


MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


def dates_in(message):
    """Every date of the message as ISO text."""
    found = re.findall(r"(\d{4})[-/](\d\d)[-/](\d\d)", message)
    number = r"(\d{1,2})(?:st|nd|rd|th)?"
    for day, month, year in re.findall(rf"{number} (?:of )?([A-Z][a-z]+) (\d{{4}})", message):
        found.append((year, MONTHS.index(month[:3].lower()) + 1, day))
    for month, day, year in re.findall(rf"([A-Z][a-z]+) {number}, (\d{{4}})", message):
        if month[:3].lower() in MONTHS:
            found.append((year, MONTHS.index(month[:3].lower()) + 1, day))
    return [f"{year}-{int(month):02d}-{int(day):02d}" for year, month, day in found]


SIGNS = {"$": "USD", "€": "EUR", "£": "GBP"}
WORDS = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "francs": "CHF", "Swiss": "CHF"}


def amounts_in(message):
    """Every (amount, currency) of the message."""
    number = r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d\d)?)"
    codes = "USD|EUR|GBP|CHF"
    found = [(n, SIGNS[s]) for s, n in re.findall(rf"([$€£]){number}", message)]
    found += [(n, c) for c, n in re.findall(rf"\b({codes}) {number}", message)]
    found += [
        (n, WORDS.get(w, w))
        for n, w in re.findall(rf"(?<![\d$€£.,]){number} ({codes}|{'|'.join(WORDS)})\b", message)
    ]
    return [(float(n.replace(",", "")), currency) for n, currency in found]


def test_dates_are_those_of_the_message(pairs):
    for split in SPLITS:
        for message, answer in pairs[split]:
            assert dates_in(message) == [json.loads(answer)["date"]], message


def test_amounts_are_those_of_the_message(pairs):
    """A second amount is in the message only next to a word that says it is another one."""
    for split in SPLITS:
        for message, answer in pairs[split]:
            fields = json.loads(answer)
            found = amounts_in(message)
            assert (fields["amount"], fields["currency"]) in found, message
            assert len(found) == 1 or re.search(r"\b(limit|budget)\b", message), message


def test_whole_amounts_are_integers_and_cents_lose_no_digit(pairs):
    for _, answer in pairs["train"]:
        digits = re.search(r'"amount": ([\d.]+)', answer)[1]
        assert re.fullmatch(r"\d+|\d+\.\d?[1-9]", digits)


def test_projects_are_those_of_the_message(pairs):
    for split in SPLITS:
        for message, answer in pairs[split]:
            project = json.loads(answer)["project"]
            assert re.findall(r"\b[A-Z]{2}-\d\d\b", message) == ([project] if project else [])


def test_people_are_the_names_of_the_message_but_for_bystanders(pairs):
    known = {*demo_phrases.NAMES, *demo_phrases.TEST_NAMES}
    bystander = re.compile(
        r"([Aa]pproved|signed|asked|[Tt]ell|[Cc]opy|approval|[Ll]et|[Ii]nform)\b", re.ASCII
    )
    for split in SPLITS:
        for message, answer in pairs[split]:
            people = json.loads(answer)["people"]
            found = [word for word in re.findall(r"[A-Z][a-z]+", message) if word in known]
            others = [name for name in found if name not in people]
            assert [name for name in found if name in people] == people, message
            assert len(others) <= 1
            assert not others or bystander.search(message), message


def test_categories_are_those_of_the_item(pairs):
    owner = {
        item: category
        for category, (common, extra, _) in demo_phrases.ITEMS.items()
        for item in (*common, *extra)
    }
    # The longest item first: "tea and biscuits", not "tea".
    items = re.compile(rf"\b({'|'.join(sorted(owner, key=len, reverse=True))})\b")
    for split in SPLITS:
        for message, answer in pairs[split]:
            found = {owner[item] for item in items.findall(message.lower())}
            assert found == {json.loads(answer)["category"]}, message


def test_a_receipt_is_true_exactly_where_it_is_affirmed(pairs):
    for split in SPLITS:
        affirmed = demo_phrases.PHRASES[split].receipt
        for message, answer in pairs[split]:
            said = any(text in message for text in affirmed)
            assert json.loads(answer)["receipt"] == said, message


def test_values_vary(pairs):
    answers = [json.loads(answer) for _, answer in pairs["train"]]
    assert len({a["date"] for a in answers}) > 1000
    assert len({a["amount"] for a in answers}) > 1500
    for key, kinds in (("currency", 4), ("category", 6)):
        counts = Counter(a[key] for a in answers)
        assert len(counts) == kinds
        assert min(counts.values()) > 0.8 * len(answers) / kinds
    for key in ("project", "people"):
        share = sum(bool(a[key]) for a in answers) / len(answers)
        assert 0.4 < share < 0.75


def test_the_test_split_has_values_training_never_shows(pairs):
    train = " ".join(message for message, _ in pairs["train"])
    test = " ".join(message for message, _ in pairs["test"])
    new_items = [item for _, extra, _ in demo_phrases.ITEMS.values() for item in extra]
    for new in (demo_phrases.TEST_NAMES, new_items):
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, new))})\b", re.IGNORECASE)
        assert pattern.search(test)
        assert not pattern.search(train), pattern.search(train)


def test_write(tmp_path, pairs):
    paths = write(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"{split}.jsonl" for split in SPLITS]
    for path, split in zip(paths, SPLITS, strict=True):
        messages = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
        assert [(m[1]["content"], m[2]["content"]) for m in messages] == pairs[split]
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "qtune.data.demo", str(tmp_path), "--seed", "3"]
    subprocess.run(command, check=True, capture_output=True)
    first = json.loads((tmp_path / "test.jsonl").read_text("utf-8").splitlines()[0])
    assert first == rows("test", 1, seed=3)[0]


def test_draws_are_even():
    draw = Draw("even")
    counts = Counter(draw.below(5) for _ in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    # Five standard deviations of a binomial with 5000 draws and p = 1/5.
    assert all(abs(count - 1000) < 142 for count in counts.values())
    assert sorted(draw.distinct("abcd", 4)) == list("abcd")
    assert draw.distinct("abcd", 0) == []
