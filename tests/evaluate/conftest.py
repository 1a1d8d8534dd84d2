"""A tiny chat model with a real tokenizer, and tasks of the lm-eval harness in files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from qtune.data.rows import Row
from qtune.evaluate.table import Merge, Table
from qtune.evaluate.table import Row as Measured
from qtune.evaluate.task_score import TaskScore
from qtune.evaluate.text_perplexity import TextLikelihood
from qtune.model import attention

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; turns end with <|end|>, which is not the tokenizer's end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A random two-layer Llama in float32 whose next token depends on all before it."""
    attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    made = LlamaForCausalLM._from_config(config, attn_implementation=attention.NAME)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    made.config.use_cache = False
    return made.eval()


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """Conversations of different lengths."""
    questions = [
        "Hi",
        "What is the price of it?",
        "A",
        "How far is it from here to there?",
        "Go on",
    ]
    return [
        Row("t", i, [{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}])
        for i, q in enumerate(questions)
    ]


CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""
GROUP = """
group: both
task: [letters, more_letters]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
NUM_ROWS = 12


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: `letters`, twice in the group `both`, and `writing`."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    rows = [
        {"question": f"{i} is", "choices": [f"{chr(97 + i)}", f"{chr(65 + i)}!"], "answer": i % 2}
        for i in range(NUM_ROWS)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = CHOICE.format(data=data)
    (folder / "letters.yaml").write_text(choice)
    (folder / "more.yaml").write_text(choice.replace("task: letters", "task: more_letters"))
    (folder / "writing.yaml").write_text(WRITE.format(data=data))
    (folder / "both.yaml").write_text(GROUP)
    return folder


BASE = Measured(
    name="base 16-bit",
    kind="base",
    loss=3.25,
    perplexity=25.79,
    tokens=4321,
    kl=2.8125,
    top1=0.4567,
    nats=3.1988,
    standard_error=0.0412,
    exact_match=0.0,
    metric="json_match",
    interval=(0.0, 0.037),
    p_value=0.0,
    answers=100,
    size_bytes=269_060_552,
    tokens_per_s=304.26,
    consumer="transformers",
)
TUNED = replace(
    BASE, name="adapter on nf4", kind="adapter", loss=0.0512, perplexity=1.0525, kl=None, top1=None,
    exact_match=0.87, interval=(0.790, 0.922), p_value=None, nats=None, standard_error=None,
    size_bytes=105_000_000, consumer=None, exact=True,
)  # fmt: skip
EXPORT = replace(
    TUNED, name="export bitsandbytes", kind="export", loss=0.0514, kl=0.0004, top1=0.9993,
    tokens_per_s=None, exact_match=None, answers=0, interval=None, metric=None, nats=0.0002,
    standard_error=None, size_bytes=12_345_678_901,
)  # fmt: skip


@pytest.fixture
def table() -> Table:
    """A base, the trained model and an export, without tasks."""
    return Table("adapter on nf4", [BASE, TUNED, EXPORT], Merge("original", "0.05 against 0.06"))


@pytest.fixture
def asked_table(table: Table) -> Table:
    """The same with scores of tasks and of a text."""
    score = TaskScore(
        task="gsm8k", metric="exact_match", value=0.52, standard_error=0.05, interval=(0.42, 0.62),
        num=100,
    )  # fmt: skip
    text = TextLikelihood(
        file="wiki.txt", nats=700.0, tokens=300, words=200, bytes=1000, context=64, stride=32
    )
    worse = replace(score, value=0.3, interval=(0.21, 0.4), p_value=0.002)
    bare = replace(score, standard_error=None, interval=None)
    other = replace(bare, task="wikitext", metric="word_perplexity", value=31.5)
    rows = [
        replace(table.rows[0], tasks=(worse, other), text=text),
        replace(table.rows[1], tasks=(score, other), text=replace(text, nats=650.0)),
        table.rows[2],
    ]
    return replace(table, rows=rows)
