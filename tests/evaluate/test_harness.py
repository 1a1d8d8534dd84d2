import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtune.evaluate import harness
from qtune.evaluate.harness import run_tasks
from qtune.evaluate.intervals import wilson_interval
from qtune.evaluate.tasks import load_tasks
from qtune.recipe_evaluate import Evaluate

evaluator = pytest.importorskip("lm_eval.evaluator")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """The model of one test is that of the next."""
    monkeypatch.setenv("QTUNE_CACHE", str(tmp_path))


def loglikelihood(model, tokenizer, question, continuation):
    ids = tokenizer(question)["input_ids"]
    target = tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + target])).logits[0].double()
    found = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(target)[:, None])
    return found.sum().item()


def run(model, tokenizer, folder, *names, shots=None, name="m", **settings):
    tasks = load_tasks(names, folder, shots)
    return run_tasks(model, tokenizer, tasks, Evaluate(batch_size=4, **settings), name)


def questions(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_choices_are_those_of_the_likelihood(model, tokenizer, task_folder):
    acc, norm = run(model, tokenizer, task_folder, "letters")
    expected, expected_norm = [], []
    for row in questions(task_folder):
        found = [loglikelihood(model, tokenizer, row["question"], f" {c}") for c in row["choices"]]
        normed = [v / len(c) for v, c in zip(found, row["choices"], strict=True)]
        expected.append(float(found.index(max(found)) == row["answer"]))
        expected_norm.append(float(normed.index(max(normed)) == row["answer"]))
    assert acc.values == tuple(expected) and norm.values == tuple(expected_norm)
    assert (acc.score.task, acc.score.metric, acc.score.num) == ("letters", "acc", 12)
    assert 0 < acc.score.value == sum(expected) / 12 < 1
    assert acc.score.interval == wilson_interval(int(sum(expected)), 12)


def test_scores_and_errors_are_those_of_the_harness_itself(model, tokenizer, task_folder):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    names = ("letters", "writing")
    lm = huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=4)
    loaded = load_tasks(names, task_folder, 2).loaded
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    expected = evaluator.evaluate(lm, loaded, bootstrap_iters=10, limit=10)["results"]
    for one in run(model, tokenizer, task_folder, *names, shots=2, task_limit=10):
        truth = expected[one.score.task]
        assert one.score.value == pytest.approx(truth[f"{one.score.metric},none"])
        error = truth[f"{one.score.metric}_stderr,none"]
        assert one.score.standard_error == pytest.approx(error)
        assert one.score.num == 10


def test_answers_are_those_that_were_written(model, tokenizer, task_folder):
    (exact,) = run(model, tokenizer, task_folder, "writing")
    assert exact.score.metric == "exact_match" and exact.score.value == 0
    # a model that always says the same letter is right where that is asked for
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (letter,) = tokenizer("a")["input_ids"]
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
    with torch.no_grad():
        model.lm_head.bias[letter] = 5
    path = task_folder / "rows.jsonl"
    assert "aaaaa" not in path.read_text()
    found = asked_of(model, tokenizer, task_folder, "writing")
    assert set(found) == {"aaaaa"}


def asked_of(model, tokenizer, folder, *names, **settings):
    """What was kept of the model's answers."""
    run(model, tokenizer, folder, *names, **settings)
    cache = harness.AnswerCache(harness.fingerprint(model, tokenizer))
    return list(cache._answers.values())


def test_each_model_has_the_same_examples_in_its_prompts(model, tokenizer, task_folder):
    first = run(model, tokenizer, task_folder, "letters", shots=3)
    assert run(model, tokenizer, task_folder, "letters", shots=3) == first


def test_a_group_is_the_mean_of_its_rows(model, tokenizer, task_folder):
    (both,) = run(model, tokenizer, task_folder, "both", task_limit=7)
    acc, _ = run(model, tokenizer, task_folder, "letters", task_limit=7)
    assert both.score.task == "both" and both.score.num == 14
    assert both.score.value == pytest.approx(acc.score.value)
    assert both.values == acc.values * 2
    spread = acc.score.standard_error * math.sqrt(6 / 7 * 14 / 13 / 2)
    assert both.score.standard_error == pytest.approx(spread)


def test_what_was_asked_before_is_not_asked_again(model, tokenizer, task_folder, monkeypatch):
    first = run(model, tokenizer, task_folder, "letters", "writing", task_limit=5)
    passes = []
    forward = model.forward

    def counted(*args, **kwargs):
        passes.append(kwargs["input_ids"].shape)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    assert run(model, tokenizer, task_folder, "letters", "writing", task_limit=5) == first
    # the probe of the fingerprint
    assert passes == [(1, 64)]
    passes.clear()
    more, _ = run(model, tokenizer, task_folder, "letters", task_limit=6)
    # both choices of the sixth row at once
    assert passes[1:] == [(2, 6)] and more.score.num == 6


def test_an_adapted_model_is_left_as_it_was(model, tokenizer, task_folder):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    adapted.train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    assert tokenizer.pad_token_id is None
    tuned, _ = run(adapted, tokenizer, task_folder, "letters")
    with adapted.disable_adapter():
        plain, _ = run(adapted, tokenizer, task_folder, "letters")
    # the adapter is at its start, where it changes nothing
    assert tuned == plain
    assert adapted.training and tokenizer.pad_token_id is None
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_questions_through_the_chat_template(model, tokenizer, task_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        harness, "question", lambda kind, args: seen.append(args[0]) or str(len(seen))
    )
    run(model, tokenizer, task_folder, "writing", task_chat=True, task_limit=1)
    assert seen == ["<|user|>0 is<|end|><|assistant|>"]


def test_each_draw_is_a_question_of_its_own():
    class Request:
        def __init__(self, **settings):
            self.args = ("q", settings)

    greedy, drawn = Request(do_sample=False), Request(do_sample=True)
    keys = harness._questions("generate_until", [greedy, greedy, drawn, drawn])
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert harness._questions("generate_until", [drawn, drawn]) == keys[2:]


def test_only_the_bar_is_told(model, tokenizer, task_folder, capfd):
    run(model, tokenizer, task_folder, "letters", "writing", name="the base")
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "likelihoods in tasks, the base 24/24",
        "answers to tasks, the base 12/12",
    ]


def test_llama_cpp_is_asked_as_any_other(tiny_model, task_folder, tmp_path):
    pytest.importorskip("xllamacpp")
    from qtune.export.consumers import llamacpp
    from qtune.export.gguf_file.base import write_base

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    write_base(tiny_model, tmp_path / "model.gguf")
    engine = llamacpp.load(tmp_path / "model.gguf", tiny_model)
    names = ("letters", "writing")
    found = run(engine, tokenizer, task_folder, *names, task_limit=6)
    assert [one.score.task for one in found] == ["letters", "letters", "writing"]
    answers = asked_of(engine, tokenizer, task_folder, *names, task_limit=6)
    truth = asked_of(model, tokenizer, task_folder, *names, task_limit=6)
    likelihoods = [(a[0], b[0]) for a, b in zip(answers, truth, strict=True) if isinstance(a, list)]
    assert len(likelihoods) == 12
    for value, expected in likelihoods:
        # the file holds float16
        assert value == pytest.approx(expected, abs=0.05)
