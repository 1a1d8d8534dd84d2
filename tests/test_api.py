"""What `qtune.load` returns, by itself and in the hands of TRL's trainers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

import qtune
from qtune.data.chat import encode
from qtune.data.collate import collate
from qtune.data.rows import Row
from qtune.data.sample import Sample
from qtune.errors import UserError
from qtune.quant.linear import QuantLinear
from qtune.recipe import Data
from qtune.recipe_train import Train
from qtune.train.objective import load_objective

LORA = qtune.Lora(rank=4, alpha=8)
TEXTS = {
    "prompt": ["name the order", "who", "say the date of the order", "the total"],
    "completion": [" order twelve of Monday", " nobody", " Monday the first", " 40 EUR"],
}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONE_STEP = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}
# TRL and PEFT use names that transformers has replaced; TRL sets one of them by default
from_trl = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
)


@pytest.fixture
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """Model and tokenizer, computing in float32, with an adapter."""
    torch.manual_seed(0)
    return qtune.load(str(tiny_model), lora=LORA, dtype="float32", device="cpu")


def values(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, now in model.state_dict().items() if not torch.equal(now, before[name])}


def assert_only_the_adapter_learned(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    learned = changed(model, before)
    assert learned and all("lora_" in name for name in learned), learned


def samples_of(batch: dict[str, Tensor]) -> list[Sample]:
    """The rows of a padded batch, with the tokens that have a label."""
    samples = []
    for ids, labels, live in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        n = int(live.sum())
        samples.append(Sample("t", ids[:n].tolist(), (labels[:n] != -100).float().tolist()))
    return samples


def own_loss(model: PeftModel, samples: list[Sample]) -> float:
    """qtune's loss of these samples, packed into one row."""
    objective = load_objective(Train(steps=1))
    with torch.no_grad():
        loss, _ = objective.loss(model, collate(samples), None)
    return float(loss) / objective.count(samples)


def first_loss(trainer: Trainer) -> float:
    return float(trainer.state.log_history[0]["loss"])


def sft(loaded: tuple[Any, Any], folder: Path, rows: dict[str, Any], **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=loaded[0],
        args=SFTConfig(output_dir=folder, **{**ONE_STEP, **options}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=loaded[1],
    )


def test_the_base_is_quantized_and_frozen(tiny_model):
    base, tokenizer = qtune.load(str(tiny_model), device="cpu")
    layers = [layer for layer in base.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 14 and not any(p.requires_grad for p in base.parameters())
    assert base.dtype == torch.bfloat16 and base.device == torch.device("cpu")
    assert tokenizer.decode(tokenizer("order").input_ids) == "order"


def test_the_adapter_is_trained_in_float32(loaded):
    model, _ = loaded
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize(("quant", "dtype"), [(None, torch.float32), ("int8", "float16")])
def test_other_formats_and_dtypes(quant, dtype, tiny_model):
    base, _ = qtune.load(str(tiny_model), quant=quant, dtype=dtype, device="cpu")
    assert isinstance(base.model.layers[0].mlp.up_proj, QuantLinear) == (quant is not None)
    assert base.get_input_embeddings().weight.dtype == (torch.float16 if quant else torch.float32)


def test_settings_of_the_recipe_can_be_given(tiny_model):
    quant = qtune.Quant(format="nf4", group_size=32, skip=("lm_head", "down_proj"))
    base, _ = qtune.load(str(tiny_model), quant=quant, device="cpu")
    assert not isinstance(base.model.layers[0].mlp.down_proj, QuantLinear)
    assert base.model.layers[0].mlp.up_proj.group_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "nf5"}, "no such number format; take one of .*nf4"),
        ({"dtype": "bf16"}, "take bfloat16, float16 or float32"),
        ({"dtype": torch.int8}, "take bfloat16, float16 or float32"),
        ({"model": "/nowhere"}, "no such folder or file"),
        ({"lora": qtune.Lora(target_modules=("w_q",))}, "'w_q' matches no layer"),
        ({"lora": qtune.Lora(init="cloq")}, "cloq measures the model on text; a recipe's run does"),
        ({"quant": qtune.Quant(method="gptq")}, "gptq measures the model on text"),
    ],
)
def test_mistakes_are_named(options, message, tiny_model):
    with pytest.raises(UserError, match=message):
        qtune.load(**{"model": str(tiny_model), "device": "cpu", **options})


def test_importing_qtune_imports_nothing_heavy():
    code = (
        "import sys, qtune; assert callable(qtune.load)\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@from_trl
def test_a_step_of_trls_sft_on_completions(loaded, tmp_path):
    model, _ = loaded
    trainer = sft(loaded, tmp_path, TEXTS)
    batch = next(iter(trainer.get_train_dataloader()))
    expected, before = own_loss(model, samples_of(batch)), values(model)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)
    assert_only_the_adapter_learned(model, before)


@from_trl
def test_a_step_of_trls_sft_on_assistant_turns(loaded, tmp_path):
    model, tokenizer = loaded
    tokenizer.chat_template = MARKED
    talks = [
        [{"role": "user", "content": ask}, {"role": "assistant", "content": answer.strip()}] * 2
        for ask, answer in zip(*TEXTS.values(), strict=True)
    ]
    trainer = sft(loaded, tmp_path, {"messages": talks}, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    settings = Data(train="unused")
    samples = [
        sample
        for number, talk in enumerate(talks)
        for sample in encode(tokenizer, Row("t", number, talk), settings=settings)
    ]
    # the same tokens with the same mask, in another order
    assert sorted((list(s.ids), list(s.weights)) for s in samples) == sorted(
        (s.ids, s.weights) for s in samples_of(batch)
    )
    expected, before = own_loss(model, samples), values(model)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(expected, rel=1e-4)
    assert_only_the_adapter_learned(model, before)


@from_trl
@pytest.mark.parametrize(
    "options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}]
)
def test_samples_that_trl_packs_do_not_see_each_other(options, loaded, tmp_path):
    model, _ = loaded
    padded = sft(loaded, tmp_path / "padded", TEXTS)
    expected = own_loss(model, samples_of(next(iter(padded.get_train_dataloader()))))
    flat = sft(loaded, tmp_path / "flat", TEXTS, **options)
    batch = next(iter(flat.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    with torch.no_grad():
        assert flat.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


@from_trl
def test_gradient_checkpointing_changes_nothing(tiny_model, tmp_path):
    adapters = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        given = qtune.load(str(tiny_model), lora=LORA, dtype="float32", device="cpu")
        sft(given, tmp_path, TEXTS, activation_checkpointing=checkpointing).train()
        adapters.append({n: v for n, v in values(given[0]).items() if "lora_" in n})
    for name, plain in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], plain, rtol=1e-4, atol=1e-6)


@from_trl
def test_what_trl_saves_is_a_peft_folder(loaded, tiny_model, tmp_path):
    model, tokenizer = loaded
    trainer = sft(loaded, tmp_path, TEXTS, save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = tokenizer("name the order", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.eval()(ids).logits
    for folder in ("checkpoint-1", "final"):
        base, _ = qtune.load(str(tiny_model), dtype="float32", device="cpu")
        again = PeftModel.from_pretrained(base, tmp_path / folder)
        assert again.peft_config["default"].base_model_name_or_path == str(tiny_model)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, expected)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert PeftModel.from_pretrained(dense, tmp_path / "final") is not None


@from_trl
def test_a_step_of_trls_grpo(loaded, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = loaded
    seen: list[str] = []

    def variety(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(set(completion))) for completion in completions]

    options = {"num_generations": 4, "max_completion_length": 8, "seed": 1}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=variety,
        args=GRPOConfig(output_dir=tmp_path, **options, **ONE_STEP),
        train_dataset=Dataset.from_dict({"prompt": TEXTS["prompt"]}),
        processing_class=tokenizer,
    )
    before = values(model)
    trainer.train()
    assert len(seen) == 4
    assert torch.isfinite(torch.tensor(first_loss(trainer)))
    assert_only_the_adapter_learned(model, before)
