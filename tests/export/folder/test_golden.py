"""Golden prompts: what is kept of them, and what counts as another answer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.export.exporter import Trained
from qtune.export.folder import golden
from qtune.export.folder.golden import NUM_PROMPTS, Prompt, Swap, compare, entry, is_tie

MESSAGES = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


def row(**fields: Any) -> Row:
    return Row("rows.jsonl", 1, **({"messages": MESSAGES} | fields))


def test_prompt_of_a_row_has_all_three_forms(train: Callable[..., Trained]) -> None:
    tokenizer = train().tokenizer
    (found,) = golden.prompts(tokenizer, [row()], [])
    expected = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert found.text == expected
    assert found.messages == MESSAGES[:1] and found.tools is None
    assert found.prompt_ids == tokenizer(expected, add_special_tokens=False).input_ids


def test_plain_row_has_no_messages(train: Callable[..., Trained]) -> None:
    found = golden.of_row(train().tokenizer, row(plain=True))
    assert (found.text, found.messages) == ("ab", None)


def test_there_are_a_few_and_no_long_ones(train: Callable[..., Trained]) -> None:
    long = [{"role": "user", "content": "x" * golden.LONGEST}, MESSAGES[1]]
    rows = [row(messages=long), *[row()] * 9]
    found = golden.prompts(train().tokenizer, rows, [])
    assert len(found) == NUM_PROMPTS and all(len(p.prompt_ids) < 100 for p in found)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0, 0, 0, 1, 1, 0], 3), ([0, 1, 1, 1, 1, 1], 3), ([0] * 6, 6)],
    ids=["answer", "plain text", "nothing learned"],
)
def test_without_test_rows_held_out_samples_begin(
    weights: list[float], expected: int, train: Callable[..., Trained]
) -> None:
    ids = [70, 71, 72, 73, 74, 75]
    (found,) = golden.prompts(train().tokenizer, [], [Sample("x", ids, weights)])
    assert found.prompt_ids == ids[:expected] and found.messages is None


def test_text_that_has_other_tokens_is_left_out(train: Callable[..., Trained]) -> None:
    """The tokens of one character, of which none is text by itself."""
    tokenizer = train().tokenizer
    both = tokenizer("é", add_special_tokens=False).input_ids
    assert golden.of_ids(tokenizer, both).text == "é"
    assert golden.of_ids(tokenizer, both[:1]).text is None


def made(rows: list[list[float]], answer: list[int]) -> dict[str, Any]:
    values = torch.tensor(rows).log_softmax(-1)
    return entry(Prompt([1, 2], "p"), answer, "a", values)


def test_entry_keeps_the_likeliest_with_finite_numbers() -> None:
    found = made([[4.0, 0, 0, 0, 0, 3.0, -torch.inf]], [0])
    assert found["top_ids"][0][:2] == [0, 5] and len(found["top_ids"][0]) == golden.TOP
    expected = torch.tensor([4.0, 0, 0, 0, 0, 3.0]).double().log_softmax(-1)
    assert found["top_logprobs"][0][:2] == pytest.approx(expected[[0, 5]].tolist(), abs=1e-4)
    assert found["greedy_logprobs"] == found["top_logprobs"][0][:1]
    low = made([[0.0, -torch.inf]], [0])
    assert low["top_logprobs"] == [[0.0, golden.LOWEST]]


def test_same_answer_has_no_change() -> None:
    rows = [[4.0, 1, 0], [0, 2.0, 5]]
    found = compare(made(rows, [0, 2]), torch.tensor(rows).log_softmax(-1))
    assert found.change < 1e-4 and found.first is None


def test_change_is_the_mean_over_candidates_by_their_probability() -> None:
    rows = torch.tensor([[0.7, 0.3], [0.6, 0.4]]).log()
    now = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    found = compare(made(rows.tolist(), [0, 0]), now)
    moved = 0.7 * abs((torch.tensor(0.6 / 0.7)).log()) + 0.3 * (torch.tensor(0.4 / 0.3)).log()
    assert found.change == pytest.approx(float(moved) / 2, abs=1e-3)


def test_first_other_token_is_named() -> None:
    rows = [[4.0, 0, 0], [4.0, 0, 0], [4.0, 0, 0]]
    now = [[4.0, 0, 0], [0, 0, 4.0], [0, 4.0, 0]]
    found = compare(made(rows, [0, 0, 0]), torch.tensor(now).log_softmax(-1))
    assert found.first == Swap(1, 0, 2)


def test_token_that_was_as_likely_is_a_tie() -> None:
    rows = [[4.0, 3.9, 0]]
    found = compare(made(rows, [0]), torch.tensor([[3.9, 4.0, 0]]).log_softmax(-1))
    assert found.first is None
    assert is_tie(made(rows, [0]), 0, 1) and not is_tie(made(rows, [0]), 0, 2)
