"""Spans from templates written as Python functions, so each way of locating is met on its own."""

import pytest

from qtune.data.spans import Rendered, RenderError, SpanError

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
    return [full[a:b] for a, b in Rendered(render, messages, full, special).answers().values()]


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

    assert texts(render, special=["<u>", "<a>"]) == ["yo", "ok$"]


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

    with pytest.raises(SpanError, match="changes or drops message 2"):
        texts(render)


def test_stand_ins_in_the_data_are_an_error_only_where_they_are_needed():
    odd = [*MESSAGES[:-1], {"role": "assistant", "content": "\ue0f0\ue0f1\ue0f2"}]
    assert texts(plain, odd) == ["yo<e>", "\ue0f0\ue0f1\ue0f2<e>"]

    def render(messages, *, add_generation_prompt=False):
        return "^" + plain(messages) + "$"

    with pytest.raises(SpanError):
        texts(render, odd)


def test_text_behind_the_terminator_is_left_out():
    def render(messages, *, add_generation_prompt=False):
        return plain(messages) + ("a:" if add_generation_prompt else "<eos>")

    assert texts(render) == ["yo<e>", "ok<e>"]


def test_answers_begin_where_generation_does():
    """The last answer gets an empty thought, which the generation prompt does not hold."""

    def render(messages, *, add_generation_prompt=False):
        last = len(messages) - 1
        text = "".join(
            ("a:" + ("<t></t>" if i == last else "") if m["role"] == "assistant" else "u:")
            + m["content"]
            + "<e>"
            for i, m in enumerate(messages)
        )
        return text + ("a:" if add_generation_prompt else "")

    assert texts(render) == ["yo<e>", "<t></t>ok<e>"]


def test_an_answer_that_shows_in_later_text_is_not_replaced():
    def render(messages, *, add_generation_prompt=False):
        headers = ["", *("-" * len(m["content"]) for m in messages)]
        text = "".join(
            f"{header}{m['role'][0]}:{m['content']}<e>\n"
            for header, m in zip(headers, messages, strict=False)
        )
        return text + (f"{headers[-1]}a:" if add_generation_prompt else "")

    assert texts(render) == ["yo<e>", "ok<e>"]
    with pytest.raises(SpanError, match="changes or drops message 2"):
        Rendered(render, MESSAGES, render(MESSAGES), SPECIAL).content(1)


def calls(render):
    """Texts of a call, its answer, and the answer to another question."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "4"}
    return texts(render, [MESSAGES[0], call, tool, MESSAGES[1], *MESSAGES[2:]])


def with_calls(messages, end="<e>"):
    parts = (
        f"[{m['tool_calls'][0]['function']['name']}]" if "tool_calls" in m else m["content"]
        for m in messages
    )
    roles = (m["role"][0] for m in messages)
    return "".join(f"{role}:{part}{end}\n" for role, part in zip(roles, parts, strict=True))


def test_calls_are_located_where_answers_would_be():
    def render(messages, *, add_generation_prompt=False):
        return with_calls(messages) + ("a:" if add_generation_prompt else "")

    assert calls(render) == ["[f]<e>", "yo<e>", "ok<e>"]


def test_calls_that_no_answer_can_stand_for():
    """The question in front moves with the conversation, and answers must alternate."""

    def render(messages, *, add_generation_prompt=False):
        plain = [m["role"] for m in messages if m["role"] != "tool" and "tool_calls" not in m]
        if plain != ["user", "assistant"] * (len(plain) // 2) + ["user"] * (len(plain) % 2):
            raise RenderError("must alternate")
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        text = with_calls(messages[:last]) + "!" + with_calls(messages[last:])
        return text + ("a:" if add_generation_prompt else "")

    assert calls(render) == ["[f]<e>", "yo<e>", "ok<e>"]


def test_content_of_any_message():
    rendered = Rendered(plain, MESSAGES, plain(MESSAGES), SPECIAL)
    cut = [plain(MESSAGES)[slice(*rendered.content(i))] for i in range(4)]
    assert cut == ["hi", "yo", "hm", "ok"]

    def dropping(messages, *, add_generation_prompt=False):
        return plain([m for m in messages if m["role"] == "assistant"])

    with pytest.raises(SpanError, match="drops message 1"):
        Rendered(dropping, MESSAGES, dropping(MESSAGES), SPECIAL).content(0)


FULL = plain(MESSAGES) + "<eos>"


def marked(*marks):
    def render(messages, *, add_generation_prompt=False):
        return plain(messages) + ("a:" if add_generation_prompt else "<eos>")

    spans = [(FULL.index(text), FULL.index(text) + len(text)) for text in marks]
    found = Rendered(render, MESSAGES, FULL, SPECIAL).within(spans)
    return {turn: [FULL[a:b] for a, b in parts] for turn, parts in found.items()}


@pytest.mark.parametrize(
    "marks",
    [("yo", "ok"), ("yo<e>\n", "ok<e>\n"), ("a:yo", "a:ok<e>\n<eos>"), ("yo", "ok", "<eos>")],
    ids=["contents", "with the tail", "with the header", "with the end of the text"],
)
def test_marks_get_their_terminator_and_lose_what_is_not_the_answer(marks):
    assert marked(*marks) == {1: ["yo<e>"], 3: ["ok<e>"]}


def test_parts_of_a_turn_may_be_marked():
    assert marked("y", "ok") == {1: ["y"], 3: ["ok<e>"]}


def test_marks_on_other_text_are_an_error():
    with pytest.raises(SpanError, match="marks 'hm', which is not the assistant's"):
        marked("yo", "hm", "ok")


def test_a_turn_without_marks_is_an_error():
    with pytest.raises(SpanError, match="marks nothing of message 4"):
        marked("yo")


@pytest.mark.parametrize("tail", ["", "<e>", "<e>\n"])
def test_marks_are_believed_where_nothing_else_works(tail):
    def render(messages, *, add_generation_prompt=False):
        text = plain([m | {"content": m["content"] * 2} for m in messages])
        return f"{len(messages)} messages: {text}"

    full = render(MESSAGES)
    rendered = Rendered(render, MESSAGES, full, SPECIAL)
    with pytest.raises(SpanError):
        rendered.answers()
    at = {text: full.index(text) for text in ("yoyo", "okok", "hmhm")}
    marks = [(at[text], at[text] + len(text + tail)) for text in ("yoyo", "okok")]
    found = rendered.within(marks)
    expected = "<e>" if tail else ""
    assert {turn: full[slice(*parts[0])] for turn, parts in found.items()} == {
        1: "yoyo" + expected,
        3: "okok" + expected,
    }
    with pytest.raises(SpanError, match="changes or drops message 2"):
        rendered.within([*marks, (at["hmhm"], at["hmhm"] + 4)])
