"""Against transformers' generate, one prompt at a time and without padding."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qtune.data.chat import prompt_ids
from qtune.data.rows import Row
from qtune.evaluate.generate import answer, stop_ids
from qtune.quant.linear import QuantLinear

NEW = 12


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> list[list[int]]:
    """Ids generated for each row alone, up to and with the stop token."""
    made = []
    for row in rows:
        ids = torch.tensor([prompt_ids(tokenizer, row.messages[:-1])])
        stops = [tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|endoftext|>")]
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            eos_token_id=stops,
            pad_token_id=0,
        )
        made.append(out[0, ids.shape[1] :].tolist())
    return made


@pytest.fixture
def stopping(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model, inclined to end its turn at different places."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.lm_head = nn.Linear(64, len(tokenizer), bias=True).requires_grad_(False)
    torch.manual_seed(5)
    nn.init.normal_(model.lm_head.weight, std=0.2)
    model.lm_head.bias.zero_()
    model.lm_head.bias[end] = 3.0
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_answers_are_those_of_each_prompt_alone(
    stopping: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    batch_size: int,
) -> None:
    expected = one_by_one(stopping, tokenizer, rows)
    found = answer(stopping, tokenizer, rows, max_new_tokens=NEW, batch_size=batch_size)
    assert found.texts == tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert found.num_tokens == sum(map(len, expected))
    assert found.tokens_per_s == found.num_tokens / found.seconds > 0
    # the fixture is of use only if rows end early, and not together
    lengths = {len(ids) for ids in expected}
    assert min(lengths) < NEW and len(lengths) > 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention(
    stopping: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    implementation: str,
) -> None:
    expected = answer(stopping, tokenizer, rows, max_new_tokens=NEW).texts
    stopping.set_attn_implementation(implementation)
    assert answer(stopping, tokenizer, rows, max_new_tokens=NEW).texts == expected


def test_adapter_on_quantized_layers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, QuantLinear.from_linear(layer))
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = get_peft_model(model, config).train()
    found = answer(tuned, tokenizer, rows, max_new_tokens=NEW)
    assert tuned.training
    expected = one_by_one(tuned.eval(), tokenizer, rows)
    assert found.texts == tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_decoding_recommended_by_the_model_is_not_used(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    plain = answer(model, tokenizer, rows, max_new_tokens=NEW).texts
    recommended = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0}
    model.generation_config.update(**recommended, no_repeat_ngram_size=1, num_beams=2)
    assert answer(model, tokenizer, rows, max_new_tokens=NEW).texts == plain


def test_progress(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    seen: list[tuple[int, int]] = []
    answer(
        model,
        tokenizer,
        rows,
        max_new_tokens=1,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    end, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<|end|>", "<|endoftext|>"))
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == sorted([end, eos])
    model.generation_config.eos_token_id = [7, eos]
    assert stop_ids(model, tokenizer) == sorted([7, end, eos])
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert stop_ids(get_peft_model(model, config), tokenizer) == sorted([7, end, eos])


# template, what ends an assistant's turn in it
TURNS = {
    "headers": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
        "<|end|>",
    ),
    "end token": (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "<|endoftext|>",
    ),
    "none": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        None,
    ),
}


@pytest.mark.parametrize("style", TURNS)
def test_end_of_turn_of_a_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, style: str
) -> None:
    template, end = TURNS[style]
    model.generation_config.eos_token_id = None
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        expected = {tokenizer.eos_token_id}
        if end is not None:
            expected.add(tokenizer.convert_tokens_to_ids(end))
        assert stop_ids(model, tokenizer) == sorted(expected)
    finally:
        tokenizer.chat_template = before


def test_model_that_cannot_restrict_its_logits(
    stopping: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    expected = answer(stopping, tokenizer, rows, max_new_tokens=NEW).texts
    known = type(stopping)

    class OfBefore(known):  # type: ignore[misc, valid-type]
        def forward(self, input_ids=None, attention_mask=None, **kwargs):  # type: ignore[no-untyped-def]
            return known.forward(self, input_ids, attention_mask, **kwargs)

    stopping.__class__ = OfBefore
    assert answer(stopping, tokenizer, rows, max_new_tokens=NEW).texts == expected


def test_head_sees_the_last_position_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    given: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    answer(model, tokenizer, rows, max_new_tokens=3)
    assert [tuple(x.shape) for x in given] == [(5, 1, 64)] * 3
    # else the CPU multiplies row by row, with a copy of the head for each
    assert all(x.is_contiguous() for x in given)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_tools_reach_the_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    given: list[list[int]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"][0].tolist()),
        with_kwargs=True,
    )
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + before
    try:
        answer(model, tokenizer, [replace(rows[0], tools=TOOLS)], max_new_tokens=1)
        expected = prompt_ids(tokenizer, rows[0].messages[:1], TOOLS)
    finally:
        tokenizer.chat_template = before
    assert given == [expected]
    assert '"name": "add"' in str(tokenizer.decode(expected))


def test_plain_texts_need_no_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[Row]
) -> None:
    ids = torch.tensor([tokenizer("Hi").input_ids])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
        use_cache=True, pad_token_id=0,
    )  # fmt: skip
    before = tokenizer.chat_template
    tokenizer.chat_template = None
    try:
        found = answer(model, tokenizer, [replace(rows[0], plain=True)], max_new_tokens=5)
        assert stop_ids(model, tokenizer) == [tokenizer.eos_token_id]
    finally:
        tokenizer.chat_template = before
    assert found.texts == [tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)]
