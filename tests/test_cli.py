import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qtune import cli, machine, plan, recipe_yaml, run, run_folder
from qtune.train.log import read_metrics

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i} and one?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ]
    }
    for i in range(6)
]


@pytest.fixture
def recipe_file(tiny_model, tmp_path, monkeypatch):
    """A valid recipe in a folder of its own, which is also where commands run."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_rows("rows.jsonl", ROWS)
    text = f"""\
model: {tiny_model}
data:
  train: rows.jsonl
  validation: demo:validation?rows=2
  max_length: 512
lora:
  rank: 4
train:
  steps: 2
  batch_size: 2
  lr: 1e-3
  eval_every: 0
evaluate:
  answer_rows: 0
export: []
run: out
"""
    Path("r.yaml").write_text(text)
    return Path("r.yaml")


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def files():
    """Everything below the working folder, with its content."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


@pytest.fixture
def refused(capsys):
    """A caller of the command: exit code 2 and nothing changed on disk; returns the message."""

    def call(*arguments):
        capsys.readouterr()
        before = files()
        assert cli.main([str(argument) for argument in arguments]) == 2
        assert files() == before
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return call


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  rank: 4", "  rnak: 4", "r.yaml:7:3: unknown key 'rnak' in 'lora'; did you mean 'rank'"),
        ("  rank: 4", "  rank: four", "r.yaml:7:9: "),
        ("  rank: 4", "  rank: 4\n  rank: 8", "r.yaml:8:3: "),
        ("  lr: 1e-3", '  lr: "2e-4"', "r.yaml:11:7: "),
        ("  lr: 1e-3", "  lr: -1", "train.lr (-1"),
        ("  rank: 4", "  dropout: 1.5", "lora.dropout (1.5) must be in [0, 1)"),
        ("  eval_every: 0", "  eval_every: -1", "train.eval_every (-1) must be at least 0"),
        ("  answer_rows: 0", "  loss_rows: 0", "evaluate.loss_rows (0) must be at least 1"),
        ("export: []", "export: [ggml]", "r.yaml:15:10: "),
        ("export: []", "seed: -1", "seed (-1) must be at least 0"),
    ],
)
def test_mistakes_in_the_recipe(recipe_file, refused, old, new, message):
    text = recipe_file.read_text()
    assert text.count(old) == 1
    recipe_file.write_text(text.replace(old, new))
    assert message in refused("train", recipe_file)


def test_overrides_are_checked_wherever_they_stand(recipe_file, refused):
    assert "override 'lora.rank=x'" in refused("train", recipe_file, "lora.rank=x")
    assert "override 'lora.rank=x'" in refused("train", recipe_file, "--resume", "lora.rank=x")
    with pytest.raises(SystemExit):
        cli.main(["train", str(recipe_file), "--resmue"])
    assert "'lora.rank=4': of a run that is trained" in refused("eval", "out", "lora.rank=4")
    with pytest.raises(SystemExit):
        cli.main(["report", "out", "evaluate.loss_rows=4"])


def test_missing_recipe(recipe_file, refused):
    assert "did you mean r.yaml" in refused("train", "s.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=./nowhere", "no such folder"),
        ("data.train=row.jsonl", "did you mean rows.jsonl"),
        ("data.train=empty.jsonl", "empty.jsonl: holds no rows"),
        ("quant.group_size=1024", "quant.group_size (1024) fits no layer"),
        ("lora.target_modules=[qkv]", "'qkv' matches no layer; there are: down_proj, gate_proj"),
        ("lora.modules_to_save=[q_proj]", "'q_proj' is quantized"),
        ("data.max_length=16", "tokens, but data.max_length is 16"),
        ("data.test=rows.jsonl evaluate.metric=json_match evaluate.answer_rows=9", "holds no JSON"),
        ("train.steps=null train.epochs=0.1 train.warmup_steps=3", "train.warmup_steps (3)"),
    ],
)
def test_what_the_recipe_names_does_not_fit(recipe_file, refused, override, message):
    Path("empty.jsonl").write_text("\n")
    assert message in refused("train", recipe_file, *override.split())
    assert message in refused("check", recipe_file, *override.split())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "hello"}, "sentence"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "unknown role 'boss'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "is from the user; only an"),
    ],
)
def test_bad_rows_are_named(recipe_file, refused, row, message):
    write_rows("rows.jsonl", [*ROWS, row])
    found = refused("train", recipe_file)
    assert "rows.jsonl:7: " in found and message in found


def test_a_test_row_needs_a_question(recipe_file, refused):
    write_rows("test.jsonl", [{"messages": [{"role": "assistant", "content": "4"}]}])
    message = refused("train", recipe_file, "data.test=test.jsonl")
    assert "test.jsonl:1: a test row needs a message before" in message


def test_broken_model_folders(recipe_file, refused, tiny_model):
    shutil.copytree(tiny_model, "model")
    weights = Path("model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "is cut off or damaged" in refused("train", recipe_file, "model=model")
    weights.unlink()
    assert "holds no weights" in refused("train", recipe_file, "model=model")


@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_a_model_that_lacks_a_tensor(recipe_file, refused, tiny_model, name):
    shutil.copytree(tiny_model, "model")
    weights = Path("model/model.safetensors")
    tensors = load_file(weights)
    del tensors[f"model.layers.1.{name}"]
    save_file(tensors, weights, metadata={"format": "pt"})
    message = refused("train", recipe_file, "model=model")
    assert "model lacks" in message and f"model.layers.1.{name.split('.')[0]}" in message


def test_exports_are_asked_before_training(recipe_file, refused):
    options = ("quant.format=int8", "export=[bitsandbytes]", "merge.quantized=pair")
    assert "export bitsandbytes: " in refused("train", recipe_file, *options)


def test_not_enough_memory(recipe_file, refused, monkeypatch):
    monkeypatch.setattr(run, "available_bytes", lambda device: 1000)
    message = refused("train", recipe_file)
    assert "not enough memory: " in message and "; try a smaller " in message


def test_disk_too_small(recipe_file, refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "disk too small" in refused("train", recipe_file)


def test_unwritable_run_folder(recipe_file, refused):
    Path("file").write_text("in the way")
    assert "run folder file/out cannot be written" in refused("train", recipe_file, "run=file/out")
    assert "file exists" in refused("train", recipe_file, "run=file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(recipe_file, refused):
    Path("locked").mkdir(mode=0o500)
    assert "no permission in" in refused("train", recipe_file, "run=locked/out")


def test_existing_run_folder(recipe_file, refused):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    message = refused("train", recipe_file)
    assert "--resume" in message and "run=out-2" in message


def test_nothing_to_resume(recipe_file, refused):
    assert "nothing to resume: out holds no run" in refused("train", recipe_file, "--resume")


def test_runs_that_are_none_or_not_trained(recipe_file, refused):
    run_folder.create(recipe_yaml.load(recipe_file))
    for verb in ("eval", "merge", "export"):
        assert "nowhere is no run folder" in refused(verb, "nowhere")
        assert "out holds no adapter: its training has not ended" in refused(verb, "out")


@pytest.fixture
def trained(recipe_file):
    """The recipe of a run that was trained and lost its adapter: as if stopped at the last step."""
    assert cli.main(["train", str(recipe_file)]) == 0
    shutil.rmtree("out/adapter")
    return recipe_file


def test_what_cannot_be_resumed(trained, refused, capsys):
    message = refused("train", trained, "--resume", "lora.rank=8", "train.lr=1")
    assert "lora.rank: 4 -> 8; train.lr: 0.001 -> 1" in message and "run=NAME" in message
    assert "--allow lora.rank train.lr" in message
    message = refused("train", trained, "--resume", "--allow", "lora.rank", "lora.rank=8")
    assert "out/checkpoints/step-000002 holds another adapter" in message

    write_rows("rows.jsonl", ROWS[:-1])
    assert "the training data has changed" in refused("train", trained, "--resume")
    write_rows("rows.jsonl", ROWS)

    # the damaged one is named, and the one before it is used
    tensors = Path("out/checkpoints/step-000002/adapter.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capsys.readouterr()
    assert cli.main(["train", str(trained), "--resume"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{tensors} is corrupt" in said and "going on from out/checkpoints/step-000000" in said
    assert tensors.read_bytes() == whole
    assert Path("out/adapter/adapter_model.safetensors").is_file()


def test_without_a_whole_checkpoint_nothing_starts_over(trained, refused):
    for file in Path("out/checkpoints").glob("*/rng.safetensors"):
        file.unlink()
    message = refused("train", trained, "--resume")
    assert "no whole checkpoint is left in out/checkpoints" in message and "remove out" in message


def test_a_resumed_run_may_change_what_is_allowed_by_name(trained):
    allowed = ["train.steps=3", "--resume", "--allow", "train.steps", "train.lr", "train.lr=1e-4"]
    assert cli.main(["train", str(trained), *allowed]) == 0
    assert [m["lr"] <= 1e-4 for m in read_metrics(Path("out")) if "loss" in m][-1:] == [True]
    assert Path("out/checkpoints/step-000003").is_dir()
    # now that is the run's recipe; what does not concern training changes freely
    again = ["train.steps=3", "train.lr=1e-4", "export=[adapter]", "--resume"]
    assert cli.main(["train", str(trained), *again]) == 0
    assert Path("out/export/adapter").is_dir()


def test_changed_rows_are_allowed_by_name(trained):
    write_rows("rows.jsonl", ROWS[:-1])
    assert cli.main(["train", str(trained), "--resume", "--allow", "data"]) == 0


def test_unknown_export_name(trained, refused):
    assert cli.main(["train", str(trained), "--resume"]) == 0
    message = refused("export", "out", "--to", "gguf9")
    assert "unknown export 'gguf9'; there are: adapter, adapter-gguf, bf16" in message


def test_a_run_that_never_reached_a_checkpoint_can_be_resumed(recipe_file, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.loop, "train", stop)
        assert cli.main(["train", str(recipe_file)]) == 130
    assert Path("out/recipe.yaml").is_file() and not Path("out/checkpoints").exists()
    assert cli.main(["train", str(recipe_file), "--resume"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_end_with_a_checkpoint_and_a_hint(recipe_file, number):
    command = [sys.executable, "-m", "qtune.cli", "train", str(recipe_file), "train.steps=5000"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not Path("out/checkpoints/step-000000").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number, message
    assert "stopping after this step" in message
    assert "`qtune train r.yaml train.steps=5000 --resume` goes on" in message
    # where it stopped, not where it would have saved
    assert max(path.name for path in Path("out/checkpoints").iterdir()) != "step-000000"


def test_an_interrupt_elsewhere_gives_no_advice(recipe_file, monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "check", stop)
    assert cli.main(["check", str(recipe_file)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_defects_keep_their_traceback(recipe_file, monkeypatch):
    def fail(*arguments):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(run, "check", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["check", str(recipe_file)])


def test_processes_but_the_first_say_who_they_are(recipe_file, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("process 1: error: nowhere.yaml")


def test_help_imports_nothing_heavy():
    """In under half a second, which no clock has to prove: what takes longer is not imported."""
    code = (
        "import sys\nfrom qtune.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'pydantic', 'rich', 'numpy', 'yaml'}\n"
        "print('heavy:', heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "KEY=VALUE" in done.stdout and "heavy: set()" in done.stdout


def test_the_recipe_is_judged_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom qtune.cli import main\nmain(['train', 'nowhere.yaml'])\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_check_shows_what_is_learned_and_writes_nothing(recipe_file, capsys):
    before = files()
    assert cli.main(["check", str(recipe_file)]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:1" in out and "‹It is 1.<|im_end|>›" in out
    assert files() == before


def test_schema_is_json(capsys):
    assert cli.main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_memory_is_asked_of_the_machine():
    assert 0 < machine.available_bytes(plan.torch.device("cpu")) < 2**50
