"""Chat templates: which one a tokenizer gets, what names it, and that its clock stands still."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from qtune.data.chat import encode, prompt_ids
from qtune.data.spans import RenderError
from qtune.data.template import (
    DATE,
    marks,
    renderer,
    template_date,
    template_hash,
    template_of,
    use_template,
)
from qtune.errors import UserError
from qtune.recipe import Data

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture
def other_days(monkeypatch):
    """Sets the clock that transformers gives to templates."""

    def set_day(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return day

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat_template_utils._compile_jinja_template.cache_clear()

    return set_day


def test_own_template_stays(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    use_template(tokenizer, None)
    assert tokenizer.chat_template == template_of(tokenizer) == PLAIN


def test_template_from_a_file(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("x")
    path = tmp_path / "own.jinja"
    path.write_bytes(PLAIN.encode() + b"\r\n")
    use_template(tokenizer, str(path))
    # line ends are part of the hash
    assert tokenizer.chat_template == PLAIN + "\r\n"
    assert renderer(tokenizer)(MESSAGES).startswith("user: a</s>assistant: b</s>")


@pytest.mark.parametrize("dated", ["", "{{ strftime_now('%Y') }}"])
def test_syntax_errors_name_file_and_line(dated, make_tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(f"{dated}{{% for m in messages %}}\n{{{{ m.content }}}}\n{{% endfo %}}\n")
    with pytest.raises(UserError, match=rf"{path}:3: data\.template is no Jinja template: .*endfo"):
        use_template(make_tokenizer("x"), str(path))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{{ raise_exception('not so') }}", "cannot render a question and its answer: not so"),
        ("{{ messages[7].content.text }}", "cannot render a question and its answer"),
        (" \n", "is empty"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_files_that_are_no_template(content, problem, make_tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"data\.template .*own\.jinja.*{problem}"):
        use_template(make_tokenizer("x"), str(path))


def test_missing_file(make_tokenizer):
    with pytest.raises(UserError, match=r"data\.template chat-ml cannot be read .* or chatml"):
        use_template(make_tokenizer("x"), "chat-ml")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_chatml(adds_bos, make_tokenizer, tokenizers):
    tokenizer = make_tokenizer("x", bos="<s>", eos="<|im_end|>", adds_bos=adds_bos)
    use_template(tokenizer, "chatml")
    text = renderer(tokenizer)(MESSAGES, add_generation_prompt=True)
    begin = "<s>" if adds_bos else ""
    assert text == begin + renderer(tokenizers["chatml"])(MESSAGES, add_generation_prompt=True)


def test_chatml_needs_its_tokens(make_tokenizer):
    tokenizer = make_tokenizer("x")
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k != "<|im_end|>"}
    tokenizer.get_vocab = lambda: vocabulary
    with pytest.raises(UserError, match=r"needs the token <\|im_end\|>.* ends answers with </s>"):
        use_template(tokenizer, "chatml")


def test_no_template(make_tokenizer):
    tokenizer = make_tokenizer("x")
    tokenizer.chat_template = None
    for call in (template_of, template_hash, renderer, template_date):
        with pytest.raises(UserError, match=r"instruct version .* data\.template"):
            call(tokenizer)


def test_hash_follows_the_template(make_tokenizer):
    one, same, other = make_tokenizer("a"), make_tokenizer("a"), make_tokenizer("b")
    # echo -n a | sha256sum
    expected = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert template_hash(one) == template_hash(same) == expected
    assert template_hash(one) != template_hash(other)


def test_several_templates(make_tokenizer):
    tokenizer = make_tokenizer("x")
    tokenizer.chat_template = {"default": PLAIN, "tool_use": "{{ tools[0].function.name }}"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert template_of(tokenizer) == PLAIN
    assert renderer(tokenizer, tools)(MESSAGES) == "add"
    first = template_hash(tokenizer)
    tokenizer.chat_template["tool_use"] += "!"
    assert template_hash(tokenizer) != first
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": PLAIN}
    with pytest.raises(UserError, match=r"several chat templates and no default \(rag, tool"):
        template_of(tokenizer)


def test_refusals_are_render_errors(make_tokenizer):
    for template in ("{{ raise_exception('no') }}", "{{ 'a' + none }}", "{{ x.y.z }}"):
        with pytest.raises(RenderError):
            renderer(make_tokenizer(template))(MESSAGES)
    with pytest.raises(RenderError):
        renderer(make_tokenizer(PLAIN))([])


@pytest.mark.parametrize(
    "template", ["{{ strftime_now('%d %b %Y') }}|", "\n {{ strftime_now(f) }}"]
)
def test_the_day_does_not_change(template, make_tokenizer, row, other_days):
    tokenizer = make_tokenizer("{% set f = '%Y-%m-%d' %}" + template + PLAIN)
    conversation = row("a", "b")
    seen = []
    for day in (datetime(2025, 1, 2), datetime(2026, 3, 4)):
        other_days(day)
        (sample,) = encode(tokenizer, conversation, settings=Data(train="x"))
        seen.append((sample.ids, prompt_ids(tokenizer, conversation.messages[:1])))
    assert seen[0] == seen[1]
    other_days(DATE)
    assert renderer(tokenizer)(MESSAGES) == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert template_date(tokenizer) == "2024-07-26"
    assert template_date(make_tokenizer(PLAIN)) is None


@pytest.mark.parametrize("lead", ["", "\n", "  ", "\n\n  "])
def test_the_clock_changes_nothing_else(lead, make_tokenizer, other_days):
    other_days(DATE)
    template = (
        lead + "{% if true %}\n x{{ strftime_now('%A %-d %B %y, %H:%M:%S %%') }}\n{% endif %}"
    )
    tokenizer = make_tokenizer(template.replace(" %%", ""))
    ours = renderer(tokenizer)(MESSAGES)
    assert ours == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "Friday 26 July 24, 00:00:00" in ours


def test_marks(make_tokenizer, tokenizers):
    tokenizer = tokenizers["markers"]
    text = renderer(tokenizer)(MESSAGES)
    assert [text[a:b] for a, b in marks(tokenizer, MESSAGES, None, text)] == ["b"]
    assert marks(tokenizer, MESSAGES, None, text + " ") == []
    assert marks(make_tokenizer(PLAIN), MESSAGES, None, "x") == []
    variable = make_tokenizer(PLAIN + "{% if add_generation_prompt %}{{ generation }}{% endif %}")
    assert marks(variable, MESSAGES, None, renderer(variable)(MESSAGES)) == []
