import pytest

from qtune.data.rows import Row
from qtune.data.suits import check_form, form_of
from qtune.errors import UserError

SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = {
    "answer": Row("x", 1, SAID),
    "text": Row("x", 1, SAID[1:], plain=True),
    "pair": Row("x", 1, SAID, rejected=SAID),
    "labelled answer": Row("x", 1, SAID, label=False),
}
SUITS = {
    "sft": {"answer", "text"},
    "pretrain": {"answer", "text"},
    "dpo": {"pair"},
    "orpo": {"pair"},
    "simpo": {"pair"},
    "kto": {"labelled answer"},
}


@pytest.mark.parametrize("form", ROWS)
def test_forms_of_rows(form):
    assert form_of(ROWS[form]) == form


def test_a_pair_of_plain_texts_is_a_pair():
    assert form_of(Row("x", 1, SAID, plain=True, rejected=SAID)) == "pair"


@pytest.mark.parametrize("objective", SUITS)
@pytest.mark.parametrize("form", ROWS)
def test_objectives_take_rows_of_their_form_only(objective, form):
    if form in SUITS[objective]:
        check_form(objective, form, "x:1")
    else:
        with pytest.raises(UserError, match=rf"^x:1: train.objective: {objective} needs "):
            check_form(objective, form, "x:1")


def test_the_error_says_what_to_do():
    with pytest.raises(UserError) as error:
        check_form("sft", "pair", "x:7")
    assert str(error.value) == (
        "x:7: train.objective: sft needs a conversation without another answer beside it or a "
        "label or plain text, and this row is two answers, 'chosen' and 'rejected'; change the "
        "data, or set train.objective: dpo or orpo or simpo"
    )
