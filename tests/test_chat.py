"""The chat with a real tiny model; the user is a list of lines, the terminal a list of texts."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtune import chat as chat_module
from qtune import recipe_yaml
from qtune.chat import HELP, Partner, chat, open_partner
from qtune.data.chat import prompt_ids, template_hash
from qtune.errors import UserError
from qtune.export.folder.manifest import write_template
from qtune.model.kv_cache import PackedLayer
from qtune.model.load import load_base, load_tokenizer, register
from qtune.quant.linear import QuantLinear
from qtune.recipe import Data, Quant, Recipe, Train

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random weights, one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("model")
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def partner(folder: Path) -> Partner:
    return open_partner(str(folder), CPU, report=lambda text: None)


def typing(*lines: str) -> Callable[[str], str]:
    """What `input` would return, line by line, then the end of input."""
    rest: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def expected_reply(partner: Partner, messages: list[dict[str, str]], new: int) -> str:
    ids = torch.tensor([prompt_ids(partner.tokenizer, messages)])
    end = partner.tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    out = partner.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        eos_token_id=end, use_cache=True, pad_token_id=0,
    )  # fmt: skip
    text = partner.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text)


def run(partner: Partner, *lines: str, new: int = 20) -> list[str]:
    """Everything written, without the help at the start."""
    written: list[str] = []
    chat(partner, typing(*lines), written.append, max_new_tokens=new)
    assert written[0] == HELP
    return written[1:]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_turns_build_on_each_other(partner: Partner) -> None:
    first = expected_reply(partner, [user("Hello there")], 20)
    messages = [user("Hello there"), assistant(first), user("And now?")]
    second = expected_reply(partner, messages, 20)
    assert "".join(run(partner, "Hello there", "", "  And now? ")) == f"{first}\n{second}\n"
    assert second != expected_reply(partner, [user("And now?")], 20)


def test_reset_forgets(partner: Partner) -> None:
    again = expected_reply(partner, [user("Hello there")], 20)
    written = "".join(run(partner, "Hello there", "/reset", "Hello there"))
    assert written == f"{again}\n{again}\n"


def test_system_message(partner: Partner) -> None:
    system = {"role": "system", "content": "Be brief."}
    told = expected_reply(partner, [system, user("Hello")], 20)
    plain = expected_reply(partner, [user("Hello")], 20)
    assert told != plain
    written = "".join(
        run(partner, "/system Be brief.", "Hello", "/reset", "Hello", "/system", "Hello")
    )
    shown = "(system: Be brief.)\n"
    assert written == f"{shown}{told}\n{shown}{told}\n{plain}\n"


def test_answer_comes_in_pieces(partner: Partner) -> None:
    class Interested(nn.Module):
        """Says "ab ab ab ..."."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order = [partner.tokenizer.convert_tokens_to_ids(c) for c in ("a", "b", "Ġ")]
            logits = x.new_zeros(*x.shape[:-1], len(partner.tokenizer))
            logits[..., order[self.count % 3]] = 1
            self.count += 1
            return logits

        count = 0

    partner.model.lm_head = Interested()
    written = run(partner, "Go", new=9)
    assert "".join(written) == "ab ab ab \n"
    assert len(written) >= 3


@pytest.mark.parametrize("line", ["/quit", " /quit "])
def test_quit(partner: Partner, line: str) -> None:
    assert run(partner, line, "Hello") == []


def test_unknown_command_is_not_sent(partner: Partner) -> None:
    assert run(partner, "/exit now") == [f"unknown command /exit\n{HELP}"]


def test_interrupt_ends_the_answer_only(partner: Partner) -> None:
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    handle = partner.model.register_forward_pre_hook(interrupt)
    written: list[str] = []
    cut = partner.reply([user("Hello there")], written.append, 20)
    handle.remove()
    assert calls == 3
    assert cut == expected_reply(partner, [user("Hello there")], 2)
    assert len(cut) < len(expected_reply(partner, [user("Hello there")], 20))
    assert "".join(written) == cut + "\n"


def test_interrupt_at_the_prompt_ends(partner: Partner) -> None:
    def read(prompt: str) -> str:
        raise KeyboardInterrupt

    chat(partner, read, lambda text: None)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_partner(str(tmp_path / "a" / "b.gguf"), CPU, report=lambda text: None)


def recipe(folder: Path, run: Path, test: str | None) -> Recipe:
    return Recipe(
        model=str(folder),
        data=Data(train="demo:train", test=test),
        quant=Quant(),
        train=Train(steps=1),
        run=run,
    )


def finished_run(folder: Path, run: Path, test: str | None) -> nn.Module:
    """A run folder with a random adapter; the model that belongs to it."""
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe_yaml.dump(recipe(folder, run, test)))
    register()
    base = load_base(folder, Quant(), device=CPU)
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(run / "adapter")
    return model.eval()


@pytest.mark.parametrize("test", ["demo:test", None])
def test_run_folder(folder: Path, tmp_path: Path, test: str | None) -> None:
    model = finished_run(folder, tmp_path / "run", test)
    partner = open_partner(str(tmp_path / "run"), CPU, report=lambda text: None)
    assert any(isinstance(layer, QuantLinear) for layer in partner.model.modules())
    assert partner.system == "Reply with the expense as JSON."
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(partner.model(ids).logits, model(ids).logits, atol=0, rtol=0)
    assert "".join(run(partner, "Hello", new=5)).startswith("(system: Reply with the expense")


def test_run_without_test_rows_takes_held_out_ones(folder: Path, tmp_path: Path) -> None:
    finished_run(folder, tmp_path / "run", None)
    path = tmp_path / "run" / "recipe.yaml"
    held_out = tmp_path / "held_out.jsonl"
    messages = [{"role": "system", "content": "Be kind."}, user("a"), assistant("b")]
    held_out.write_text(json.dumps({"messages": messages}) + "\n")
    for validation, system in (
        (0.5, "Reply with the expense as JSON."),
        (str(held_out), "Be kind."),
    ):
        given = recipe(folder, tmp_path / "run", None)
        data = replace(given.data, validation=validation)
        path.write_text(recipe_yaml.dump(replace(given, data=data)))
        assert open_partner(str(tmp_path / "run"), CPU, report=print).system == system


def test_run_whose_template_has_changed(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished_run(folder, run, test=None)
    tokenizer = load_tokenizer(folder)
    write_template(run / "adapter", tokenizer)
    open_partner(str(run), CPU, report=lambda text: None)
    trained = template_hash(tokenizer)[:16]
    other = tmp_path / "other.jinja"
    other.write_text(str(tokenizer.chat_template).replace("<|end|>", "<|end|>\n"))
    given = recipe(folder, run, None)
    changed = replace(given, data=replace(given.data, template=str(other)))
    (run / "recipe.yaml").write_text(recipe_yaml.dump(changed))
    now = hashlib.sha256(other.read_bytes()).hexdigest()[:16]
    with pytest.raises(UserError, match=rf"its hash was {trained} and is {now}; .*data\.template"):
        open_partner(str(run), CPU, report=lambda text: None)
    kept = str(run / "adapter" / "chat_template.jinja")
    mended = replace(given, data=replace(given.data, template=kept))
    (run / "recipe.yaml").write_text(recipe_yaml.dump(mended))
    partner = open_partner(str(run), CPU, report=lambda text: None)
    assert template_hash(partner.tokenizer)[:16] == trained


def test_run_whose_data_is_gone(folder: Path, tmp_path: Path) -> None:
    finished_run(folder, tmp_path / "run", test=str(tmp_path / "gone.jsonl"))
    reports: list[str] = []
    assert open_partner(str(tmp_path / "run"), CPU, report=reports.append).system == ""
    assert "gone.jsonl" in reports[-1]


def test_run_without_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_yaml.dump(recipe(folder, tmp_path, "demo:test")))
    with pytest.raises(UserError, match=r"holds no adapter.*--resume"):
        open_partner(str(tmp_path), CPU, report=lambda text: None)


def test_talk_uses_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", typing("/quit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chat_module.talk(str(folder))
    assert capsys.readouterr().out.endswith(HELP)


def test_talk_with_keys_and_values_in_few_bits(folder: Path) -> None:
    partner = open_partner(str(folder), CPU, report=lambda text: None)
    partner.kv_bits = 8
    made: list[object] = []
    generate = partner.model.generate

    def watched(*arguments: object, **options: object) -> object:
        made.append(options["past_key_values"])
        return generate(*arguments, **options)

    partner.model.generate = watched
    question = [user("Hello")]
    partner.reply(question, lambda text: None, 20)
    (cache,) = made
    assert {type(layer) for layer in cache.layers} == {PackedLayer}
    assert cache.get_seq_length() > 0
