"""A run folder as the stages leave it, with figures like those of the quickstart."""

import json
import math
import random

import pytest

from qtune import run_folder
from qtune.evaluate.intervals import wilson_interval
from qtune.recipe import Data, Evaluate, Quant, Recipe, Train
from qtune.report import write_report

STEPS = 90
HELD_OUT = {30: 0.1421, 60: 0.0712, 90: 0.0583}
MEMORY = {
    "weights": 128_470_000,
    "adapter": 19_537_920,
    "gradients": 19_537_920,
    "optimizer": 39_075_840,
    "activations": 1_021_300_000,
    "backward": 12_300_000,
    "logits": 312_400_000,
    "temporary": 1_769_472,
}
SAMPLES = [
    {
        "prompt": "Out of pocket 936.39 CHF since October 16th, 2024: a taxi joined by Jack.",
        "before": "Sure! I can help you with that. Here is the expense as JSON:\n\n"
        '{"expense": "936.39 CHF", "date": "October 16th"}\n\nLet me know if you need more.',
        "after": '{"date": "2024-10-16", "amount": 936.39, "category": "travel", '
        '"people": ["Jack"]}',
        "reference": '{"date": "2024-10-16", "amount": 936.39, "category": "travel", '
        '"people": ["Jack"]}',
        "correct_before": False,
        "correct_after": True,
    },
    {
        "prompt": "It was me and Andre & Lena. USD 2800 on the 3rd of December 2027: an apartment.",
        "before": '{"date": "3rd of December 2027", "cost": 2800}',
        "after": '{"date": "2027-12-03", "amount": 2800.0, "category": "meals", '
        '"people": ["Andre"]}',
        "reference": '{"date": "2027-12-03", "amount": 2800, "category": "lodging", '
        '"people": ["Andre", "Lena"]}',
        "correct_before": False,
        "correct_after": False,
    },
    {
        "prompt": "<script>alert('prompt')</script> & <b>bold</b>",
        "before": "</p><script>alert(1)</script>",
        "after": '{"<img src=x onerror=alert(1)>": "</dd><script>"}',
        "reference": '{"note": "<i>"}',
        "correct_before": False,
        "correct_after": False,
    },
]


TRAINED_LOSS, BASE_LOSS = 0.0583, 2.7458
TASKS = {"gsm8k": ("exact_match (strict-match)", 250), "hellaswag": ("acc_norm", 400)}


def task_scores(shares, p_values):
    scores = zip(TASKS.items(), shares, p_values, strict=True)
    return [
        {
            "task": task,
            "metric": metric,
            "value": share,
            "standard_error": math.sqrt(share * (1 - share) / (num - 1)),
            "interval": list(wilson_interval(round(share * num), num)),
            "num": num,
            "p_value": p_value,
        }
        for (task, (metric, num)), share, p_value in scores
    ]


def evaluation_row(name, kind, loss, exact_match, size_bytes, shares=(0.31, 0.44), **more):
    trained = name == "adapter on nf4"
    answered = exact_match is not None
    return {
        "name": name,
        "kind": kind,
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": 2893,
        "kl": None,
        "top1": None,
        "nats": None if trained else loss - TRAINED_LOSS,
        "standard_error": None if trained else 0.0004 + abs(loss - TRAINED_LOSS) / 20,
        "recovery": 1 - (loss - TRAINED_LOSS) / (BASE_LOSS - TRAINED_LOSS),
        "exact_match": exact_match,
        "metric": "json_match" if answered else None,
        "interval": list(wilson_interval(round(100 * exact_match), 100)) if answered else None,
        "p_value": None if trained or not answered else 0.0312 if exact_match else 1e-9,
        "fields": {"date": 0.97, "amount": 1.0, "category": 0.95}
        if answered and exact_match
        else {},
        "answers": 100 if answered else 0,
        "tasks": task_scores(shares, (None, None) if trained else (0.41, 0.003)),
        "text": {
            "file": "wiki.txt",
            "nats": 7200.0 + 40 * loss,
            "tokens": 2400,
            "words": 1980,
            "bytes": 10_000,
            "context": 1024,
            "stride": 512,
        },
        "size_bytes": size_bytes,
        "tokens_per_s": 61.3,
        "consumer": None,
        "exact": None,
    } | more


EVALUATION = {
    "trained": "adapter on nf4",
    "rows": [
        evaluation_row(
            "base 16-bit", "base", 2.6312, 0.0, 269_060_552, (0.17, 0.43), kl=2.7144, top1=0.412
        ),
        evaluation_row(
            "base nf4", "quantized", BASE_LOSS, 0.0, 116_214_784, (0.14, 0.41),
            kl=2.8021, top1=0.403,
        ),
        evaluation_row(
            "adapter on nf4", "adapter", TRAINED_LOSS, 0.93, 135_752_704, kl=0.0, top1=1.0
        ),
        evaluation_row(
            "merged onto dequantized", "merged", 0.0611, 0.92, 269_060_552, kl=0.00391, top1=0.993
        ),
        evaluation_row(
            "export adapter", "export", TRAINED_LOSS, 0.93, 19_571_304,
            kl=1.2e-6, top1=1.0, consumer="peft", exact=True, tokens_per_s=None,
        ),
        evaluation_row(
            "export bf16", "export", 0.0611, None, 269_060_552,
            kl=0.0039, top1=0.993, consumer="transformers", exact=False,
        ),
        evaluation_row(
            "export compressed-tensors-w4a16", "export", 0.1312, 0.81, 113_300_000, (0.22, 0.40),
            kl=0.061, top1=0.951, consumer="compressed-tensors", exact=False,
        ),
        evaluation_row(
            "export gguf-q4_k_m", "export", 0.1188, 0.84, 105_400_000, (0.27, 0.42),
            kl=0.055, top1=0.957, consumer="llama.cpp", exact=False,
        ),
    ],
    "merge": {"chosen": "original", "why": "its held-out loss is lower (0.0611 against 0.0634)"},
}  # fmt: skip
PROMPTS = [
    {
        "prompt": "What did the taxi cost?",
        "reference": "936.39 CHF",
        "answers": {
            "adapter on nf4": "936.39 CHF",
            "base 16-bit": "<script>I do not know.</script>",
            "export bf16": "936.39 CHF",
            "renamed since": "936.39",
        },
    },
    {"prompt": "Say nothing.", "reference": None, "answers": {"base 16-bit": "", "base nf4": ""}},
]


def merged_layers():
    for block in range(30):
        for name, change in (("self_attn.q_proj", 0.006), ("mlp.down_proj", 0.004)):
            change_ratio = change * (1 + block / 30)
            yield {
                "layer": f"model.layers.{block}.{name}",
                "change_ratio": change_ratio,
                "error_ratio": 0.094,
                "share": 0.01 + change_ratio,
            }


def layers():
    for block in range(30):
        for name, shape in (("self_attn.q_proj", (576, 576)), ("mlp.down_proj", (576, 1536))):
            yield {
                "name": f"model.layers.{block}.{name}",
                "shape": shape,
                "format": "nf4",
                "size_bytes": shape[0] * shape[1] * 33 // 64,
            }
    size = 49152 * 576
    yield {"name": "lm_head", "shape": (49152, 576), "format": "bfloat16", "size_bytes": 2 * size}


def metrics():
    noise = random.Random(0)
    for step in range(1, STEPS + 1):
        loss = (2.6 * math.exp(-step / 9) + 0.055) * math.exp(noise.gauss(0, 0.16))
        yield {
            "step": step,
            "loss": loss,
            "lr": 1e-3 * min(step / 5, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
            "grad_norm": 0.4 + 3 * math.exp(-step / 6) + noise.random() / 5,
            "tokens": 1900 * step,
            "supervised_tokens": 760 * step,
            "tokens_per_s": 390 + noise.gauss(0, 14),
            "seconds": 4.9 * step,
            "peak_memory_bytes": 1_398_000_000 + 1000 * step,
        }
        if step in HELD_OUT:
            yield {"step": step, "held_out_loss": HELD_OUT[step], "held_out_tokens": 2893}


def train(folder):
    """The run folder `quickstart` in a folder, as training leaves it."""
    recipe = Recipe(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=Data(train="demo:train", validation="demo:validation", test="<script>x</script>"),
        quant=Quant(format="nf4"),
        train=Train(steps=STEPS, lr=1e-3, warmup_steps=5),
        evaluate=Evaluate(metric="json_match"),
        run=folder / "quickstart",
    )
    run = run_folder.create(recipe)
    plan = {
        "layers": list(layers()),
        "num_parameters": 134_515_008,
        "num_trained": 4_884_480,
        "memory": {**MEMORY, "total": sum(MEMORY.values())},
        "available_bytes": 14_200_000_000,
        "steps": STEPS,
        "tokens_per_step": 1900,
        "expected_minutes": 7.1,
    }
    run.write("plan.json", plan)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics()))
    return run


def finish(trained):
    """The run with all that comes after training."""
    versions = {"qtune": "0.1.0", "torch": "2.13.0+cpu", "bitsandbytes": None}
    trained.write(
        "environment.json",
        {
            "time": "2026-11-21T19:50:12+00:00",
            "cpu": "Intel Xeon, 2 threads, AVX512, fast bf16 by amx",
            "devices": ["cpu"],
            "versions": versions | {"python": "3.11.2 <script>"},
        },
    )
    trained.write("eval.json", EVALUATION)
    trained.write("samples.json", SAMPLES)
    trained.write("prompts.json", PROMPTS)
    layers_of = list(merged_layers())
    trained.write("merge.json", {**EVALUATION["merge"], "refused": None, "layers": layers_of})
    forms = {
        "adapter": ("peft", {"form": "adapter"}),
        "bf16": ("transformers", {"form": "merged", "onto": "original"}),
        "qtune": ("qtune", {"form": "pair"}),
    }
    for name, (consumer, form) in forms.items():
        (trained.exports / name).mkdir(parents=True)
        manifest = {
            "export": name,
            "consumer": consumer,
            "base": {"model": "x", "revision": None, "sha256": "ab" * 32, "of": "sizes and files"},
            "adapter_sha256": "cd" * 32,
        }
        trained.write(f"export/{name}/qtune.json", manifest | form)
    return trained


@pytest.fixture
def trained(tmp_path):
    """A run that was trained and then stopped."""
    return train(tmp_path)


@pytest.fixture
def finished(trained):
    """A run with everything."""
    return finish(trained)


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """A run with everything and its page, to be looked at only."""
    run = finish(train(tmp_path_factory.mktemp("reported")))
    write_report(run)
    return run


@pytest.fixture(scope="session")
def measured(reported):
    """The rows of its eval.json."""
    return reported.read("eval.json")["rows"]
