"""Spans from templates written as Python functions, so each way of locating is met on its own."""

import pytest

from qtune.data.spans import RenderError, SpanError, assistant_spans, has_markers, marked_spans

SPECIAL = ["<e>", "<eos>"]
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "hm"},
    {"role": "assistant", "content": "ok"},
]


def plain(messages, *, add_generation_prompt=False):
    text = "".join(f"{m['role'][0]}:{m['content']}<e>\n" for m in messages)
    return text + ("a:" if add_generation_prompt else "")


def texts(render, messages=MESSAGES, special=SPECIAL):
    full = render(messages)
    return [full[a:b] for a, b in assistant_spans(render, messages, full, special)]


def test_prefix_difference():
    assert texts(plain) == ["yo<e>", "ok<e>"]


def test_tail_stays_where_no_special_token_ends_the_turn():
    assert texts(plain, special=[]) == ["yo<e>\n", "ok<e>\n"]


def test_generation_prompt_that_differs_needs_sentinels():
    def render(messages, *, add_generation_prompt=False):
        return plain(messages) + ("a:<think>" if add_generation_prompt else "")

    assert texts(render) == ["yo<e>", "ok<e>"]


def test_refused_beginnings_need_sentinels():
    def render(messages, *, add_generation_prompt=False):
        if messages[-1]["role"] == "user":
            raise RenderError("must end with the assistant")
        return plain(messages, add_generation_prompt=add_generation_prompt)

    assert texts(render) == ["yo<e>", "ok<e>"]


def test_contents_are_stripped_where_that_changes_nothing():
    def render(messages, *, add_generation_prompt=False):
        return "^" + plain([{**m, "content": m["content"].strip()} for m in messages]) + "$"

    padded = [{**m, "content": f" {m['content']}\n"} for m in MESSAGES]
    assert texts(render, padded) == ["yo<e>", "ok<e>"]


def test_white_space_is_kept_where_the_template_keeps_it():
    def render(messages, *, add_generation_prompt=False):
        return "^" + plain(messages) + "$"

    padded = [{**m, "content": f" {m['content']}\n"} for m in MESSAGES]
    assert texts(render, padded) == [" yo\n<e>", " ok\n<e>"]


def test_an_open_turn_before_a_closed_one_does_not_learn_the_next_header():
    def render(messages, *, add_generation_prompt=False):
        return "^" + "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<e>"

    assert texts(render, special=["<u>", "<a>", "<e>"]) == ["yo", "ok<e>"]


def test_only_the_terminator_of_the_last_turn_counts():
    """No turn is closed here, so the header of the next turn must not be taken for the end."""

    def render(messages, *, add_generation_prompt=False):
        return "^" + "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "$"

    assert texts(render, special=["<u>", "<a>"]) == ["yo", "ok"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (str.upper, ["YO<e>", "OK<e>"]),
        (lambda text: text.replace("yo", ""), ["<e>", "ok<e>"]),
        (lambda text: text.replace("yo", "yo yo"), ["yo yo<e>", "ok<e>"]),
    ],
    ids=["changed", "dropped", "doubled"],
)
def test_what_the_template_makes_of_a_content_is_what_is_learned(change, expected):
    def render(messages, *, add_generation_prompt=False):
        return "^" + plain([{**m, "content": change(m["content"])} for m in messages]) + "$"

    assert texts(render) == expected


def test_content_rendered_twice_is_an_error():
    def render(messages, *, add_generation_prompt=False):
        return "^" + "".join(m["content"] * 2 for m in messages) + "$"

    with pytest.raises(SpanError, match="changes or drops"):
        texts(render)


def test_sentinels_in_the_data_are_an_error_only_where_they_are_needed():
    odd = [*MESSAGES[:-1], {"role": "assistant", "content": "\ue0f0\ue0f1"}]
    assert texts(plain, odd) == ["yo<e>", "\ue0f0\ue0f1<e>"]

    def render(messages, *, add_generation_prompt=False):
        return "^" + plain(messages) + "$"

    with pytest.raises(SpanError):
        texts(render, odd)


def test_marked_spans_get_their_terminator():
    full = "u:hi<e>\na:yo<e>\nu:hm<e>\na:ok<e>\n<eos>"
    bare = [(full.index("yo"), full.index("yo") + 2), (full.index("ok"), full.index("ok") + 2)]
    assert [full[a:b] for a, b in marked_spans(bare, full, SPECIAL)] == ["yo<e>", "ok<e>"]
    # Nothing is added to spans that hold their terminator, and white space behind it is left out.
    whole = [(start, end + len("<e>\n")) for start, end in bare]
    assert [full[a:b] for a, b in marked_spans(whole, full, SPECIAL)] == ["yo<e>", "ok<e>"]
    assert marked_spans([], full, SPECIAL) == []


def test_has_markers():
    assert has_markers("x{% generation %}y{% endgeneration %}")
    assert has_markers("x{%- generation -%}y")
    assert not has_markers("{{ generation }}{% if add_generation_prompt %}{% endif %}")
