"""Weights token by token, against conversations cut by hand into learned and other text."""

import logging
from dataclasses import replace

import pytest

from qtune.data.chat import encode, end_of_turn, prompt_ids
from qtune.data.rows import Row
from qtune.errors import UserError
from qtune.recipe import Data

TURNS = ("Hi there", "Hello! How can I help?", "2+2?", "It is 4.")

# Family -> (text, learned) pieces of TURNS; each piece ends where a token must end.
PIECES = {
    "chatml": [
        ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello! How can I help?<|im_end|>", True),
        ("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("It is 4.<|im_end|>", True),
        ("\n", False),
    ],
    "headers": [
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Hello! How can I help?<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("It is 4.<|eot_id|>", True),
    ],
    "gemma": [
        ("<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n", False),
        ("Hello! How can I help?<end_of_turn>", True),
        ("\n<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n", False),
        ("It is 4.<end_of_turn>", True),
        ("\n", False),
    ],
    "inst": [
        ("<s>[INST] Hi there [/INST]", False),
        (" Hello! How can I help?</s>", True),
        ("[INST] 2+2? [/INST]", False),
        (" It is 4.</s>", True),
    ],
    "end_once": [
        ("<|user|>\nHi there<|end|>\n<|assistant|>\n", False),
        ("Hello! How can I help?<|end|>", True),
        ("\n<|user|>\n2+2?<|end|>\n<|assistant|>\n", False),
        ("It is 4.<|end|>", True),
        ("\n<|endoftext|>", False),
    ],
    "thinking": [
        ("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello! How can I help?<|im_end|>", True),
        ("\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\nIt is 4.<|im_end|>", True),
        ("\n", False),
    ],
}
PIECES["markers"] = PIECES["chatml"]


def encoded(tokenizer, row, **settings):
    """The one sample of a row."""
    (sample,) = encode(tokenizer, row, settings=Data(train="x", **{"max_length": 500, **settings}))
    return sample


def tokens_of(tokenizer, pieces):
    """Ids and mask of pieces tokenised one by one."""
    ids, mask = [], []
    for text, learned in pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        mask += [learned] * len(piece)
    return ids, mask


def learned_text(tokenizer, sample):
    return tokenizer.decode(
        [i for i, learned in zip(sample.ids, sample.supervised, strict=True) if learned],
        clean_up_tokenization_spaces=False,
    )


@pytest.mark.parametrize("family", PIECES)
def test_masks_of_each_family(family, tokenizers, row):
    tokenizer = tokenizers[family]
    ids, mask = tokens_of(tokenizer, PIECES[family])
    sample = encoded(tokenizer, row(*TURNS))
    assert sample.ids == ids
    assert sample.supervised == mask


@pytest.mark.parametrize("family", PIECES)
def test_last_turn_only(family, tokenizers, row):
    tokenizer = tokenizers[family]
    last = max(i for i, (_, learned) in enumerate(PIECES[family]) if learned)
    pieces = [(text, i == last) for i, (text, _) in enumerate(PIECES[family])]
    sample = encoded(tokenizer, row(*TURNS), train_on="last")
    assert (sample.ids, sample.supervised) == tokens_of(tokenizer, pieces)


@pytest.mark.parametrize("family", PIECES)
def test_all_text(family, tokenizers, row):
    sample = encoded(tokenizers[family], row(*TURNS), train_on="all")
    assert sample.supervised == [False] + [True] * (len(sample.ids) - 1)


@pytest.mark.parametrize("family", PIECES)
def test_equal_texts_of_user_and_assistant_are_told_apart(family, tokenizers, row):
    tokenizer = tokenizers[family]
    sample = encoded(tokenizer, row("same words", "same words", "same", "same"))
    text = learned_text(tokenizer, sample)
    assert text.count("same words") == 1
    assert text.count("same") == 2


@pytest.mark.parametrize("family", PIECES)
def test_ids_are_those_of_the_template(family, tokenizers, row):
    tokenizer = tokenizers[family]
    conversation = row("Grüße 🦊 dort", "Früh → 日本 🦊", "again", "end 🦊")
    sample = encoded(tokenizer, conversation)
    assert sample.ids == tokenizer.apply_chat_template(conversation.messages)["input_ids"]
    assert learned_text(tokenizer, sample).count("🦊") == 2


@pytest.mark.parametrize("family", PIECES)
def test_prompt_is_what_comes_before_the_learned_answer(family, tokenizers, row):
    tokenizer = tokenizers[family]
    conversation = row("Hi there", "It is 4.")
    sample = encoded(tokenizer, conversation)
    prompt = prompt_ids(tokenizer, conversation.messages[:-1])
    assert sample.ids[: len(prompt)] == prompt
    assert sample.supervised.index(True) == len(prompt)


@pytest.mark.parametrize("template_bos", ["", "{{ bos_token }}"])
def test_only_the_template_decides_about_bos(template_bos, make_tokenizer, tokenizers, row):
    template = template_bos + tokenizers["chatml"].chat_template
    tokenizer = make_tokenizer(template, bos="<s>", eos="<|im_end|>", adds_bos=True)
    conversation = row("a", "b")
    sample = encoded(tokenizer, conversation)
    prompt = prompt_ids(tokenizer, conversation.messages[:1])
    count = 1 if template_bos else 0
    assert sample.ids.count(tokenizer.bos_token_id) == count
    assert prompt.count(tokenizer.bos_token_id) == count
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", ["headers", "gemma"])
def test_templates_that_strip_contents(family, tokenizers, row):
    tokenizer = tokenizers[family]
    plain = encoded(tokenizer, row(*TURNS))
    padded = encoded(tokenizer, row(*(f" {turn} \n" for turn in TURNS)))
    assert (padded.ids, padded.supervised) == (plain.ids, plain.supervised)


def test_stripped_content_located_by_a_stand_in(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
        "{{ '' if add_generation_prompt else '<eos>' }}"
    )
    sample = encoded(tokenizer, row("a", " b ", "c", "d \n"))
    # The generation prompt is empty, so an answer has to begin with its header.
    assert learned_text(tokenizer, sample) == "assistant: b</s>assistant: d</s>"


def test_markers_agree_with_transformers(make_tokenizer, tokenizers, row):
    template = tokenizers["markers"].chat_template.replace(
        "{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}<|im_end|>",
        "<|im_end|>{%- endgeneration -%}{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    conversation = row(*TURNS, system="Answer briefly.")
    theirs = tokenizer.apply_chat_template(
        conversation.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    sample = encoded(tokenizer, conversation)
    assert sample.ids == theirs["input_ids"]
    assert [int(learned) for learned in sample.supervised] == theirs["assistant_masks"]


def test_marked_part_of_a_turn_is_respected(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {% generation %}{% if m.role == 'assistant' %}"
        "{{ m.content }}</s>{% endif %}{% endgeneration %}{% if m.role == 'user' %}"
        "{{ m.content }}\n{% endif %}{% endfor %}"
    )
    sample = encoded(tokenizer, row("one", "two"))
    # The space before the marker is one token with the "t", and that has to be learned.
    assert learned_text(tokenizer, sample) == " two</s>"


def test_thoughts_of_the_last_turn_are_learned(tokenizers, row):
    tokenizer = tokenizers["thinking"]
    sample = encoded(tokenizer, row("q", "<think>\nfour\n</think>\n\nIt is 4."))
    assert learned_text(tokenizer, sample) == "<think>\nfour\n</think>\n\nIt is 4.<|im_end|>"


def test_thoughts_that_the_template_drops_are_not_learned(tokenizers, row):
    tokenizer = tokenizers["thinking"]
    thought = "<think>\nfour\n</think>\n\nIt is 4."
    sample = encoded(tokenizer, row("q", thought, "r", thought))
    assert learned_text(tokenizer, sample) == "It is 4.<|im_end|>" + thought + "<|im_end|>"


def test_dropped_thoughts_of_the_last_answer_are_an_error(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    )
    assert learned_text(tokenizer, encoded(tokenizer, row("q", "<think></think>It is 4.")))
    with pytest.raises(UserError, match=r"train\.jsonl:1: .*leaves out the thoughts of message 2"):
        encoded(tokenizer, row("q", "<think>four</think>It is 4."))


def test_a_turn_that_the_template_drops_is_an_error(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"train\.jsonl:1: cannot tell .* message 2"):
        encoded(tokenizer, row(*TURNS))


def test_a_question_that_the_template_drops_is_an_error(make_tokenizer, row):
    tokenizer = make_tokenizer("{{ messages[0].content }}{{ messages[-1].content }}</s>")
    with pytest.raises(UserError, match=r"train\.jsonl:1: .* leaves out message 3 \(user\)"):
        encoded(tokenizer, row(*TURNS))


def test_no_terminator_is_not_replaced_by_the_next_header(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else ' ' }}"
    )
    sample = encoded(tokenizer, row(*TURNS))
    assert "<|user|>" not in learned_text(tokenizer, sample)


def test_assistant_first(tokenizers, row):
    conversation = row(*TURNS)
    del conversation.messages[0]
    sample = encoded(tokenizers["chatml"], conversation)
    expected = "Hello! How can I help?<|im_end|>It is 4.<|im_end|>"
    assert learned_text(tokenizers["chatml"], sample) == expected


def test_refusal_of_the_template_names_the_row(tokenizers, row):
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*no system role here"):
        encoded(tokenizers["gemma"], row("a", "b", system="x", number=7))


def test_no_template(make_tokenizer, row):
    tokenizer = make_tokenizer("x")
    tokenizer.chat_template = None
    for call in (
        lambda: encoded(tokenizer, row("a", "b")),
        lambda: prompt_ids(tokenizer, [{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(UserError, match=r"instruct version .* data\.template"):
            call()


def test_too_long(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    whole = encoded(tokenizer, row(*TURNS))
    length = len(whole.ids)
    assert encoded(tokenizer, row(*TURNS), max_length=length) == whole
    with pytest.raises(UserError, match=rf"train\.jsonl:1: {length} tokens, .* is {length - 1};"):
        encoded(tokenizer, row(*TURNS), max_length=length - 1)
    cut = encoded(tokenizer, row(*TURNS), max_length=length - 3, overlong="truncate")
    assert (cut.ids, cut.weights) == (whole.ids[:-3], whole.weights[:-3])
    assert (cut.num_cut, whole.num_cut) == (3, 0)
    dropped = Data(train="x", max_length=length - 1, overlong="drop")
    assert encode(tokenizer, row(*TURNS), settings=dropped) == []
    with pytest.raises(UserError, match="only rows of plain text are split"):
        encoded(tokenizer, row(*TURNS), max_length=length - 1, overlong="split")


def text_row(text):
    return Row("book.txt", 3, [{"role": "assistant", "content": text}], plain=True)


def test_long_text_is_split(tokenizers):
    tokenizer = tokenizers["chatml"]
    text = "What is two plus two? " * 9
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    settings = Data(train="x", max_length=20, overlong="split")
    samples = encode(tokenizer, text_row(text), settings=settings)
    assert all(len(sample.ids) <= 20 for sample in samples)
    assert [token for sample in samples for token in sample.ids[1:]] == ids[1:]
    assert {tuple(sample.weights[:2]) for sample in samples} == {(0.0, 1.0)}
    both = Row(
        "b.jsonl", 1, [{"role": "user", "content": text}, *text_row("b").messages], plain=True
    )
    with pytest.raises(UserError, match=r"b\.jsonl:1: .* only rows of plain text are split"):
        encode(tokenizer, both, settings=settings)


def test_texts_need_no_template(make_tokenizer):
    tokenizer = make_tokenizer("x", bos="<s>", adds_bos=True)
    tokenizer.chat_template = None
    sample = encoded(tokenizer, text_row("Hello there"))
    assert sample.ids == [*tokenizer("Hello there").input_ids, tokenizer.eos_token_id]
    assert sample.weights == [0.0] + [1.0] * (len(sample.ids) - 1)


def test_prompt_of_plain_texts_is_the_beginning_of_the_row(tokenizers):
    tokenizer = tokenizers["chatml"]
    messages = [{"role": "user", "content": "Answer: "}, {"role": "assistant", "content": "four"}]
    sample = encoded(tokenizer, Row("b.jsonl", 1, messages, plain=True))
    prompt = prompt_ids(tokenizer, messages[:1], plain=True)
    assert sample.ids[: len(prompt)] == prompt
    assert sample.supervised.index(True) == len(prompt)
    assert learned_text(tokenizer, sample) == "four<|im_end|>"


def test_long_texts_raise_no_warning(tokenizers, row, caplog):
    tokenizer = tokenizers["chatml"]
    tokenizer.model_max_length = 10
    with caplog.at_level(logging.WARNING):
        encoded(tokenizer, row(*TURNS))
    assert not caplog.records


@pytest.mark.parametrize("family", PIECES)
def test_weights_of_messages(family, tokenizers, row):
    tokenizer = tokenizers[family]
    whole = encoded(tokenizer, row(*TURNS))
    weighted = row(*TURNS)
    weighted.messages[1]["weight"], weighted.messages[3]["weight"] = 0.25, 3
    sample = encoded(tokenizer, weighted)
    middle = whole.weights.index(0.0, whole.weights.index(1.0))
    expected = [w * (0.25 if i < middle else 3) for i, w in enumerate(whole.weights)]
    assert (sample.ids, sample.weights) == (whole.ids, expected)
    weighted.messages[1]["weight"] = 0
    assert encoded(tokenizer, weighted).weights == [w if w == 3 else 0 for w in expected]


def test_weights_where_all_text_is_learned(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    weighted = row(*TURNS)
    weighted.messages[1]["weight"], weighted.messages[2]["weight"] = 0, 0.5
    sample = encoded(tokenizer, weighted, train_on="all")
    ids, _ = tokens_of(tokenizer, PIECES["chatml"])
    assert sample.ids == ids
    text = {
        weight: tokenizer.decode(
            [i for i, w in zip(ids, sample.weights, strict=True) if w == weight]
        )
        for weight in (0, 0.5, 1)
    }
    assert text[0] == "<|im_start|>Hello! How can I help?<|im_end|>"
    assert text[0.5] == "2+2?"
    assert "It is 4.<|im_end|>" in text[1] and "Hi there" in text[1]


def test_weight_of_a_question_is_an_error_unless_all_is_learned(tokenizers, row):
    weighted = row("a", "b")
    weighted.messages[0]["weight"] = 2
    with pytest.raises(UserError, match=r"train\.jsonl:1: message 1 \(user\) has a weight"):
        encoded(tokenizers["chatml"], weighted)
    weighted.messages[0]["weight"] = 0
    assert encoded(tokenizers["chatml"], weighted) == encoded(tokenizers["chatml"], row("a", "b"))


@pytest.mark.parametrize("family", PIECES)
def test_preferences_are_learned_behind_the_common_beginning(family, tokenizers, row):
    tokenizer = tokenizers[family]
    chosen, rejected = row(*TURNS), row(*TURNS[:3], "It is 5.")
    pair = replace(chosen, rejected=rejected.messages)
    sample = encoded(tokenizer, pair, train_on="all")
    last = encoded(tokenizer, chosen, train_on="last")
    assert (sample.ids, sample.weights) == (last.ids, last.weights)
    assert sample.rejected == encoded(tokenizer, rejected, train_on="last")


def test_preferences_that_part_early(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    other = row("Hi there", "Go away!", "2+2?", "No.", "Please", "No!")
    pair = replace(row(*TURNS), rejected=other.messages)
    sample = encoded(tokenizer, pair)
    assert learned_text(tokenizer, sample) == "Hello! How can I help?<|im_end|>It is 4.<|im_end|>"
    expected = "Go away!<|im_end|>No.<|im_end|>No!<|im_end|>"
    assert learned_text(tokenizer, sample.rejected) == expected


def test_equal_preferences_are_an_error(tokenizers, row):
    same = row("a", "b")
    with pytest.raises(UserError, match=r"train\.jsonl:1: the chosen and the rejected .* the same"):
        encoded(tokenizers["chatml"], replace(same, rejected=same.messages))


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_both_preferences_must_fit(longer, tokenizers, row):
    tokenizer = tokenizers["chatml"]
    one, two = row("a", "b"), row("a", "b c d e f g h i j k l m n o p")
    if longer == "chosen":
        one, two = two, one
    pair = replace(one, rejected=two.messages)
    with pytest.raises(UserError, match=r"tokens, but data\.max_length is 20"):
        encoded(tokenizer, pair, max_length=20)
    dropped = Data(train="x", max_length=20, overlong="drop")
    assert encode(tokenizer, pair, settings=dropped) == []
    cut = encoded(tokenizer, pair, max_length=20, overlong="truncate")
    assert sorted((cut.num_cut > 0, cut.rejected.num_cut > 0)) == [False, True]
    assert max(len(part.ids) for part in cut.parts) == 20


def test_labels_are_about_the_last_answer(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    sample = encoded(tokenizer, replace(row(*TURNS), label=False), train_on="all")
    assert sample.label is False
    assert learned_text(tokenizer, sample) == "It is 4.<|im_end|>"
    assert encoded(tokenizer, row(*TURNS)).label is None


def test_nothing_to_learn(tokenizers):
    row = Row("train.jsonl", 4, [{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match=r"train\.jsonl:4: no message is the assistant's"):
        encoded(tokenizers["chatml"], row)


@pytest.mark.parametrize(
    ("family", "end"),
    [("chatml", "<|im_end|>"), ("headers", "<|eot_id|>"), ("end_once", "<|end|>")],
)
def test_end_of_turn(family, end, tokenizers):
    tokenizer = tokenizers[family]
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_no_end_of_turn(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert end_of_turn(tokenizer) is None
