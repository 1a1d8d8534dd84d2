# DeepSeek writes its tokens with wide bars
# ruff: noqa: RUF001
"""Masks under the templates of well-known models, read back as text from the learned tokens.

The templates come from TRL's package, which carries the models' own byte for byte, and from
`templates/` (see the README there). The tokenizers are small, but have the models' special tokens
and their habits: byte-level BPE, or pieces with a blank before each word as of SentencePiece.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from qtune.data.chat import continues_prompt, encode, end_of_turn, prompt_ids
from qtune.data.rows import Row
from qtune.errors import UserError
from qtune.recipe import Data

OURS = Path(__file__).parent / "templates"
LLAMA = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
    ),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>"),
    *("<｜tool▁output▁end｜>", "<｜tool▁sep｜>"),
)


@dataclass(frozen=True)
class Model:
    """A template, its tokenizer, and what must be learned of an answer under it."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end: str
    lead: str = ""
    stub: str = ""
    pieces: str = "bytes"
    system: bool = True
    extends_prompt: bool = True
    call: str | None = None
    takes_tools: bool = True
    stub_always: bool = False


JSON = '{"city": "Oslo"}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
LLAMA_3 = Model("trl:llama3", LLAMA, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>")
QWEN = Model("trl:qwen2_5", CHATML, None, "<|im_end|>", "<|im_end|>", call=HERMES)
GEMMA_2 = Model("trl:gemma", GEMMA, "<bos>", "<eos>", "<end_of_turn>", pieces="gemma", system=False)
NEMO_CALL = f'[TOOL_CALLS][{{"name": "weather", "arguments": {JSON}, "id": "abcdefghi"}}]'
NEMO = Model("mistral_nemo", MISTRAL, "<s>", "</s>", "</s>", system=False, call=NEMO_CALL)
SMALL_CALL = NEMO_CALL.replace("][{", "] [{")
PHI_3 = Model("trl:phi3", PHI, None, "<|endoftext|>", "<|end|>", pieces="sentencepiece")
DEEPSEEK_CALL = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{JSON}\n"
    "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_3 = Model(
    "trl:deepseekv3", DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], DEEPSEEK[1], call=DEEPSEEK_CALL,
    extends_prompt=False, takes_tools=False,
)  # fmt: skip

MODELS = {
    "llama-3": LLAMA_3,
    # Llama 3.3 has the template of 3.1
    "llama-3.1": replace(
        LLAMA_3, template="trl:llama3_1", call=f'{{"name": "weather", "parameters": {JSON}}}'
    ),
    "llama-3.2": replace(
        LLAMA_3, template="trl:llama3_2", call=f'{{"name": "weather", "parameters": {JSON}}}'
    ),
    "qwen2.5": QWEN,
    "qwen3": replace(QWEN, template="trl:qwen3", stub="<think>\n\n</think>\n\n"),
    "qwen3-2507": replace(QWEN, template="trl:qwen3_instruct_2507"),
    "qwen3-marked": replace(QWEN, template="trl:qwen3_training", stub="<think>\n\n</think>\n\n",
                            stub_always=True),
    "qwen2.5-marked": replace(QWEN, template="trl:qwen2_5_training"),
    "gemma-2": GEMMA_2,
    "gemma-3": replace(GEMMA_2, template="trl:gemma3", system=True),
    "gemma-3-marked": replace(GEMMA_2, template="trl:gemma3_training", system=True),
    "mistral-7b-v0.3": replace(
        NEMO, template="mistral_v03", lead=" ", pieces="sentencepiece", call=SMALL_CALL
    ),
    "mistral-nemo": NEMO,
    "mistral-small": replace(NEMO, template="mistral_small", system=True, call=SMALL_CALL),
    "phi-3": PHI_3,
    "phi-3.5": replace(PHI_3, template="trl:phi3_5"),
    "phi-3-marked": replace(PHI_3, template="trl:phi3_training"),
    "phi-4": Model("phi4", CHATML, None, "<|im_end|>", "<|im_end|>"),
    "deepseek-v2": Model(
        "deepseek_v2", DEEPSEEK, DEEPSEEK[0], DEEPSEEK[1], DEEPSEEK[1], lead=" "
    ),
    "deepseek-v3": DEEPSEEK_3,
    "deepseek-r1-distill": replace(DEEPSEEK_3, template="trl:deepseek_r1_distill", call=None),
}  # fmt: skip
WITH_SYSTEM = [name for name, model in MODELS.items() if model.system]
WITH_CALLS = [name for name, model in MODELS.items() if model.call]
SYSTEM = "Be brief and kind."
TURNS = ("Where is Rome?", "It lies in Italy.", "And Oslo?", "Norway 🦊, of course.")
SETTINGS = Data(train="x", max_length=4000)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The model's special tokens over a small vocabulary, with its template."""
    model = MODELS[name]
    core = {"bytes": byte_level, "gemma": gemma_like, "sentencepiece": prefixing}[model.pieces]()
    # Phi-3's swallow the white space behind them
    strips = model.special is PHI
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=strips) for t in model.special]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=model.bos, eos_token=model.eos
    )
    tokenizer.chat_template = template_text(model.template)
    return tokenizer


def template_text(name: str) -> str:
    folder, suffix = OURS, name
    if name.startswith("trl:"):
        (package,) = find_spec("trl").submodule_search_locations
        folder, suffix = Path(package) / "chat_templates", name.removeprefix("trl:")
    return (folder / f"{suffix}.jinja").read_text("utf-8")


TEXTS = [SYSTEM, *TURNS, "user assistant system model It is sunny. What about the weather?", JSON]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def _with_byte_fallback() -> Tokenizer:
    """Pieces with ▁ for blanks, and bytes for what is in no piece."""
    texts = [text.replace(" ", "▁") for text in TEXTS]
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = trained.get_vocab()
    pieces.pop("🦊", None)
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(sorted(pieces))}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, fuse_unk=True))


def gemma_like() -> Tokenizer:
    core = _with_byte_fallback()
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def prefixing() -> Tokenizer:
    """As of Llama 2: each stretch between special tokens gets a blank in front."""
    core = gemma_like()
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return core


def conversation(*texts: str, system: str | None = None) -> list[dict]:
    lead = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return lead + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def call_of_tool() -> list[dict]:
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return [
        {"role": "user", "content": "What about the weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]


def sample_of(name, messages, tools=None, **settings):
    row = Row("train.jsonl", 7, messages, tools=tools)
    (sample,) = encode(tokenizer_of(name), row, settings=replace(SETTINGS, **settings))
    return sample


def learned(name: str, sample) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, weight in zip(sample.ids, sample.weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    tokenizer = tokenizer_of(name)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def runs(name: str, *answers: str) -> list[str]:
    """What the learned runs must read: the answers as the tokenizer gives them back.

    Text behind a special token gets a blank more from tokenizers in the style of SentencePiece.
    """
    model, tokenizer = MODELS[name], tokenizer_of(name)
    stubs = [model.stub if model.stub_always else ""] * (len(answers) - 1) + [model.stub]
    leads = ["" if answer == model.call else model.lead for answer in answers]
    texts = [f"{a}{b}{c}{model.end}" for a, b, c in zip(leads, stubs, answers, strict=True)]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return [tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in ids]


def check_frame(name: str, sample, messages, tools=None) -> None:
    """One BOS where the model has one; the ids are the prompt's and then the answer's."""
    model, tokenizer = MODELS[name], tokenizer_of(name)
    if model.bos:
        assert sample.ids[0] == tokenizer.bos_token_id
        assert list(sample.ids).count(tokenizer.bos_token_id) == 1
    row = Row("train.jsonl", 7, messages, tools=tools)
    assert continues_prompt(tokenizer, row) == model.extends_prompt
    if model.extends_prompt:
        prompt = prompt_ids(tokenizer, messages[:-1], tools)
        assert list(sample.ids[: len(prompt)]) == prompt
        assert sample.weights[len(prompt)] == 1


@pytest.mark.parametrize("name", MODELS)
def test_single_turn(name):
    messages = conversation(*TURNS[:2])
    sample = sample_of(name, messages)
    assert learned(name, sample) == runs(name, TURNS[1])
    check_frame(name, sample, messages)


@pytest.mark.parametrize("name", MODELS)
def test_several_turns(name):
    messages = conversation(*TURNS)
    sample = sample_of(name, messages)
    assert learned(name, sample) == runs(name, TURNS[1], TURNS[3])
    check_frame(name, sample, messages)
    assert learned(name, sample_of(name, messages, train_on="last")) == runs(name, TURNS[3])


@pytest.mark.parametrize("name", WITH_SYSTEM)
def test_system_message(name):
    messages = conversation(*TURNS, system=SYSTEM)
    sample = sample_of(name, messages)
    assert learned(name, sample) == runs(name, TURNS[1], TURNS[3])
    assert SYSTEM in tokenizer_of(name).decode(sample.ids)
    check_frame(name, sample, messages)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(WITH_SYSTEM)))
def test_system_message_that_is_refused_or_left_out(name):
    with pytest.raises(UserError, match=r"(?i)train\.jsonl:7: .*system"):
        sample_of(name, conversation(*TURNS, system=SYSTEM))


@pytest.mark.parametrize("name", WITH_CALLS)
def test_tool_calls(name):
    model = MODELS[name]
    tools = TOOLS if model.takes_tools else None
    sample = sample_of(name, call_of_tool(), tools)
    assert learned(name, sample) == runs(name, model.call, "It is sunny.")


@pytest.mark.parametrize("name", WITH_CALLS)
def test_tool_calls_before_another_question(name):
    model = MODELS[name]
    tools = TOOLS if model.takes_tools else None
    messages = call_of_tool() + conversation(*TURNS[:2])
    sample = sample_of(name, messages, tools)
    assert learned(name, sample) == runs(name, model.call, "It is sunny.", TURNS[1])
    check_frame(name, sample, messages, tools)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(WITH_CALLS)))
def test_calls_that_the_template_cannot_show(name):
    with pytest.raises(UserError, match=r"train\.jsonl:7: the model's chat template refuses"):
        sample_of(name, call_of_tool())


@pytest.mark.parametrize("name", ["gemma-3", "phi-3", "phi-4", "deepseek-v3", "llama-3"])
def test_tools_that_the_template_leaves_out(name):
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*leaves out tool 'weather'"):
        sample_of(name, conversation(*TURNS), TOOLS)


THOUGHT = "A map comes to mind."


def thinking(key: str) -> list[dict]:
    """Two answers with thoughts, in a key of their own or within the content."""
    messages = conversation(*TURNS)
    for message in messages[1::2]:
        if key == "content":
            message["content"] = f"<think>\n{THOUGHT}\n</think>\n\n{message['content']}"
        else:
            message[key] = THOUGHT
    return messages


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-marked"])
def test_thoughts(key, name):
    messages = thinking(key)
    sample = sample_of(name, messages)
    thought = f"<think>\n{THOUGHT}\n</think>\n\n"
    # Qwen's own template shows the thoughts of the last answer only
    first = thought if MODELS[name].stub_always else ""
    end = MODELS[name].end
    assert learned(name, sample) == [first + TURNS[1] + end, thought + TURNS[3] + end]
    check_frame(name, sample, messages)


@pytest.mark.parametrize("name", ["llama-3.1", "gemma-3", "mistral-nemo", "phi-4", "qwen2.5"])
def test_thoughts_in_templates_that_know_none(name):
    messages = thinking("content")
    expected = [messages[1]["content"], messages[3]["content"]]
    assert learned(name, sample_of(name, messages)) == runs(name, *expected)
    with pytest.raises(UserError, match=r"leaves out the thoughts of message 4"):
        sample_of(name, thinking("reasoning_content"))


@pytest.mark.parametrize("key", ["content", "reasoning_content"])
@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1-distill"])
def test_thoughts_that_the_template_takes_out(key, name):
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*the thoughts of message 4"):
        sample_of(name, thinking(key))


@pytest.mark.parametrize(
    ("name", "day"), [("llama-3.2", "Today Date: 26 Jul 2024"), ("mistral-small", "is 2024-07-26.")]
)
def test_templates_with_a_clock(name, day):
    assert day in tokenizer_of(name).decode(sample_of(name, conversation(*TURNS)).ids)


@pytest.mark.parametrize("name", MODELS)
def test_end_of_turn(name):
    tokenizer = tokenizer_of(name)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(MODELS[name].end)


def all_of_trl() -> list[Path]:
    (package,) = find_spec("trl").submodule_search_locations
    return sorted((Path(package) / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", all_of_trl(), ids=lambda path: path.stem)
def test_questions_are_learned_under_no_template(path):
    """The answers, all of them and nothing else but what the template puts around them."""
    text = path.read_text("utf-8")
    core = byte_level()
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in looks_special(text)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = text
    for messages in (conversation(*TURNS), conversation(*TURNS, system=SYSTEM)):
        try:
            (sample,) = encode(tokenizer, Row("t", 1, messages), settings=SETTINGS)
        except UserError as error:
            # four take contents as lists of parts only, and Gemma has no system messages
            assert re.search(r"smolvlm|idefics3|llava|gemma(_training)?$", path.stem), error
            continue
        pairs = zip(sample.ids, sample.weights, strict=True)
        told = tokenizer.decode([token for token, weight in pairs if weight])
        assert [message["content"] in told for message in messages] == [
            message["role"] == "assistant" for message in messages
        ]


def looks_special(template: str) -> set[str]:
    """What is written like a special token in a template."""
    found = re.findall(r"<\|[^|<>{}' ]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>", template)
    return {"<s>", "</s>", *found}
