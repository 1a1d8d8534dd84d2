"""Masks token by token, against conversations cut by hand into learned and other text."""

import logging

import pytest

from qtune.data.chat import encode, encode_all, prompt_ids, special_tokens, template_hash
from qtune.errors import UserError

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
        ("It is 4.<|end|>\n<|endoftext|>", True),
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
    sample = encode(tokenizer, row(*TURNS), max_length=500)
    assert sample.ids == ids
    assert sample.supervised == mask


@pytest.mark.parametrize("family", PIECES)
def test_last_turn_only(family, tokenizers, row):
    tokenizer = tokenizers[family]
    last = max(i for i, (_, learned) in enumerate(PIECES[family]) if learned)
    pieces = [(text, i == last) for i, (text, _) in enumerate(PIECES[family])]
    sample = encode(tokenizer, row(*TURNS), train_on="last", max_length=500)
    assert (sample.ids, sample.supervised) == tokens_of(tokenizer, pieces)


@pytest.mark.parametrize("family", PIECES)
def test_all_text(family, tokenizers, row):
    sample = encode(tokenizers[family], row(*TURNS), train_on="all", max_length=500)
    assert sample.supervised == [False] + [True] * (len(sample.ids) - 1)


@pytest.mark.parametrize("family", PIECES)
def test_equal_texts_of_user_and_assistant_are_told_apart(family, tokenizers, row):
    tokenizer = tokenizers[family]
    sample = encode(tokenizer, row("same words", "same words", "same", "same"), max_length=500)
    text = learned_text(tokenizer, sample)
    assert text.count("same words") == 1
    assert text.count("same") == 2


@pytest.mark.parametrize("family", PIECES)
def test_ids_are_those_of_the_template(family, tokenizers, row):
    tokenizer = tokenizers[family]
    conversation = row("Grüße 🦊 dort", "Früh → 日本 🦊", "again", "end 🦊")
    sample = encode(tokenizer, conversation, max_length=500)
    assert sample.ids == tokenizer.apply_chat_template(conversation.messages)["input_ids"]
    assert learned_text(tokenizer, sample).count("🦊") == 2


@pytest.mark.parametrize("family", PIECES)
def test_prompt_is_what_comes_before_the_learned_answer(family, tokenizers, row):
    tokenizer = tokenizers[family]
    sample = encode(tokenizer, row("Hi there", "It is 4."), max_length=500)
    prompt = prompt_ids(tokenizer, sample.row.messages[:-1])
    assert sample.ids[: len(prompt)] == prompt
    assert sample.supervised.index(True) == len(prompt)


@pytest.mark.parametrize("template_bos", ["", "{{ bos_token }}"])
def test_only_the_template_decides_about_bos(template_bos, make_tokenizer, tokenizers, row):
    template = template_bos + tokenizers["chatml"].chat_template
    tokenizer = make_tokenizer(template, bos="<s>", eos="<|im_end|>", adds_bos=True)
    sample = encode(tokenizer, row("a", "b"), max_length=500)
    prompt = prompt_ids(tokenizer, sample.row.messages[:1])
    count = 1 if template_bos else 0
    assert sample.ids.count(tokenizer.bos_token_id) == count
    assert prompt.count(tokenizer.bos_token_id) == count
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("family", ["headers", "gemma"])
def test_templates_that_strip_contents(family, tokenizers, row):
    tokenizer = tokenizers[family]
    plain = encode(tokenizer, row(*TURNS), max_length=500)
    padded = encode(tokenizer, row(*(f" {turn} \n" for turn in TURNS)), max_length=500)
    assert (padded.ids, padded.supervised) == (plain.ids, plain.supervised)


def test_stripped_content_located_by_sentinels(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
        "{{ '' if add_generation_prompt else '<eos>' }}"
    )
    sample = encode(tokenizer, row("a", " b ", "c", "d \n"), max_length=500)
    # The generation prompt is empty, so the last answer has to begin with its header.
    assert learned_text(tokenizer, sample) == "b</s>assistant: d</s><eos>"


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
    sample = encode(tokenizer, conversation, max_length=500)
    assert sample.ids == theirs["input_ids"]
    assert [int(learned) for learned in sample.supervised] == theirs["assistant_masks"]


def test_marked_part_of_a_turn_is_respected(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {% generation %}{% if m.role == 'assistant' %}"
        "{{ m.content }}</s>{% endif %}{% endgeneration %}{% if m.role == 'user' %}"
        "{{ m.content }}\n{% endif %}{% endfor %}"
    )
    sample = encode(tokenizer, row("one", "two"), max_length=500)
    # The space before the marker is one token with the "t", and that has to be learned.
    assert learned_text(tokenizer, sample) == " two</s>"


def test_thoughts_of_the_last_turn_are_learned(tokenizers, row):
    tokenizer = tokenizers["thinking"]
    sample = encode(tokenizer, row("q", "<think>\nfour\n</think>\n\nIt is 4."), max_length=500)
    assert learned_text(tokenizer, sample) == "<think>\nfour\n</think>\n\nIt is 4.<|im_end|>"


def test_dropped_thoughts_are_an_error_not_a_guess(tokenizers, row):
    thought = "<think>\nfour\n</think>\n\nIt is 4."
    with pytest.raises(UserError, match=r"train\.jsonl:1: cannot tell .* data\.train_on: all"):
        encode(tokenizers["thinking"], row("q", thought, "r", thought), max_length=500)


def test_a_turn_that_the_template_drops_is_an_error(make_tokenizer, row):
    tokenizer = make_tokenizer("{{ messages[0].content }}{{ messages[-1].content | upper }}</s>")
    with pytest.raises(UserError, match=r"train\.jsonl:1: cannot tell"):
        encode(tokenizer, row(*TURNS), max_length=500)


def test_no_terminator_is_not_replaced_by_the_next_header(make_tokenizer, row):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else ' ' }}"
    )
    sample = encode(tokenizer, row(*TURNS), max_length=500)
    assert "<|user|>" not in learned_text(tokenizer, sample)


def test_assistant_first(tokenizers, row):
    conversation = row(*TURNS)
    del conversation.messages[0]
    sample = encode(tokenizers["chatml"], conversation, max_length=500)
    expected = "Hello! How can I help?<|im_end|>It is 4.<|im_end|>"
    assert learned_text(tokenizers["chatml"], sample) == expected


def test_refusal_of_the_template_names_the_row(tokenizers, row):
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*no system role here"):
        encode(tokenizers["gemma"], row("a", "b", system="x", number=7), max_length=500)


def test_no_template(make_tokenizer, row):
    tokenizer = make_tokenizer("x")
    tokenizer.chat_template = None
    for call in (
        lambda: encode(tokenizer, row("a", "b"), max_length=9),
        lambda: prompt_ids(tokenizer, [{"role": "user", "content": "a"}]),
        lambda: template_hash(tokenizer),
        lambda: encode_all(tokenizer, [row("a", "b")], max_length=9),
    ):
        with pytest.raises(UserError, match=r"instruct version .* chat_template\.jinja"):
            call()


def test_too_long(tokenizers, row):
    tokenizer = tokenizers["chatml"]
    whole = encode(tokenizer, row(*TURNS), max_length=500)
    length = len(whole.ids)
    assert encode(tokenizer, row(*TURNS), max_length=length) == whole
    with pytest.raises(UserError, match=rf"train\.jsonl:1: {length} tokens, .* is {length - 1};"):
        encode(tokenizer, row(*TURNS), max_length=length - 1)
    cut = encode(tokenizer, row(*TURNS), max_length=length - 3, truncate=True)
    assert (cut.ids, cut.supervised) == (whole.ids[:-3], whole.supervised[:-3])
    assert (cut.num_cut, whole.num_cut) == (3, 0)


def test_long_texts_raise_no_warning(tokenizers, row, caplog):
    tokenizer = tokenizers["chatml"]
    tokenizer.model_max_length = 10
    with caplog.at_level(logging.WARNING):
        encode(tokenizer, row(*TURNS), max_length=500)
    assert not caplog.records


def test_encode_all_reports_several_rows(tokenizers, row):
    rows = [row("a", "b " * (40 * (i % 2) + 1), number=i) for i in range(1, 7)]
    with pytest.raises(UserError) as caught:
        encode_all(tokenizers["chatml"], rows, max_length=30)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"train.jsonl:{i}" for i in (1, 3, 5)]
    short = [r for r in rows if r.number % 2 == 0]
    samples = encode_all(tokenizers["chatml"], short, max_length=30)
    assert [sample.row for sample in samples] == short


def test_template_hash_follows_the_template(make_tokenizer):
    one, same, other = make_tokenizer("a"), make_tokenizer("a"), make_tokenizer("b")
    # echo -n a | sha256sum
    expected = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert template_hash(one) == template_hash(same) == expected
    assert template_hash(one) != template_hash(other)


def test_special_tokens(tokenizers):
    special = special_tokens(tokenizers["chatml"])
    assert special[tokenizers["chatml"].convert_tokens_to_ids("<|im_end|>")] == "<|im_end|>"
    assert "assistant" not in special.values()
