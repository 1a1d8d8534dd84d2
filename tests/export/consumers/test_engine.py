"""What an engine is asked, and where its answers go, with one that adds up the ids before it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from transformers import LlamaConfig

from qtune.export.consumers.engine import EngineModel, Rows, made_ready

WIDTH = 12


class Sums(EngineModel):
    """The likeliest next token is the sum of all so far."""

    def __init__(self) -> None:
        super().__init__(LlamaConfig(vocab_size=WIDTH))
        self.asked: list[tuple[Rows, Rows]] = []

    def row_logits(self, rows: Rows, wanted: Rows) -> Tensor:
        self.asked.append((rows, wanted))
        pairs = zip(rows, wanted, strict=True)
        sums = [sum(row[: at + 1]) % WIDTH for row, places in pairs for at in places]
        return one_hot(torch.tensor(sums), WIDTH).float()


def test_padding_never_reaches_the_engine() -> None:
    model = Sums()
    ids = torch.tensor([[0, 0, 4, 5], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert model.asked == [([[4, 5], [1, 2, 3, 4]], [[0, 1], [0, 1, 2, 3]])]
    assert not logits[0, :2].any()
    assert logits.argmax(-1).tolist() == [[0, 0, 4, 9], [1, 3, 6, 10]]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(0, [1, 3, 6, 10]), (1, [10]), (2, [6, 10]), (torch.tensor([1, 3]), [3, 10])],
)
def test_only_wanted_columns_are_asked_for(keep: Any, expected: list[int]) -> None:
    model = Sums()
    logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]), logits_to_keep=keep).logits
    assert logits.argmax(-1).tolist() == [expected]
    ((_, (wanted,)),) = model.asked
    assert len(wanted) == len(expected)


def test_columns_have_to_be_in_order() -> None:
    with pytest.raises(ValueError, match="ascending"):
        Sums()(input_ids=torch.tensor([[1, 2]]), logits_to_keep=torch.tensor([1, 0]))


def test_it_generates_as_transformers_models_do(tmp_path: Any) -> None:
    model = Sums()
    made_ready(model, tmp_path)
    ids, mask = torch.tensor([[0, 3, 4], [1, 1, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0,
        eos_token_id=None, logits_to_keep=torch.tensor([-1]),
    )  # fmt: skip
    assert found[:, 3:].tolist() == [[7, 2, 4], [3, 6, 0]]
    assert all(len(wanted) == 1 for _, places in model.asked for wanted in places)
    assert str(model.device) == "cpu" and model.dtype == torch.float32


def test_an_engine_has_to_say_how() -> None:
    with pytest.raises(NotImplementedError):
        EngineModel(LlamaConfig(vocab_size=4))(input_ids=torch.tensor([[1]]))
