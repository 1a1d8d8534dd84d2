import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from rich.console import Console

from qtune import progress, show_data
from qtune.data.sample import Sample
from qtune.setup import open_setup


@pytest.fixture
def screen(monkeypatch):
    def use(**options):
        out = io.StringIO()
        console = Console(file=out, width=100, highlight=False, **options)
        for user in (show_data, progress):
            monkeypatch.setattr(user, "console", console)
        return out

    return use


def written(tmp_path, *rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question, answer, **options):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **options},
        ]
    }


def test_samples_mark_what_is_learned(tiny_recipe, screen):
    out = screen()
    setup = open_setup(tiny_recipe(), Accelerator())
    show_data.samples(setup)
    text = out.getvalue()
    every = setup.data.feed.samples
    for sample in [every[i] for i in (0, 4, 8)]:
        assert sample.place in text
        learned = [token for token, w in zip(sample.ids, sample.weights, strict=True) if w]
        assert f"‹{setup.tokenizer.decode(learned)}›" in text
    assert text.count("‹") == text.count("<|im_end|>›") == show_data.NUM_SAMPLES


def test_special_tokens_stand_out_on_a_terminal(tiny_recipe, screen):
    out = screen(force_terminal=True, color_system="standard")
    show_data.samples(open_setup(tiny_recipe(), Accelerator()))
    text = out.getvalue()
    # bold and green, bold and dim
    assert "\x1b[1;32m<|im_end|>\x1b[0m" in text and "\x1b[1;2m<|im_start|>\x1b[0m" in text


def test_weights_are_shown(tiny_recipe, screen, tmp_path):
    out = screen()
    rows = {"messages": [*talk("a", "b", weight=0.5)["messages"], *talk("c", "d")["messages"]]}
    data = {"train": written(tmp_path, rows), "test": None}
    show_data.samples(open_setup(tiny_recipe(data=data), Accelerator()))
    assert "‹b<|im_end|>› (weight 0.5)" in out.getvalue()
    assert "‹d<|im_end|>›\n" in out.getvalue().replace("\n\n", "\n")


def test_both_answers_of_a_pair_are_shown(tiny_recipe, screen, tmp_path):
    out = screen()
    pairs = [{"prompt": f"{i}?", "chosen": "good", "rejected": "bad"} for i in range(3)]
    path = written(tmp_path, *pairs)
    data = {"train": path, "validation": path, "test": None}
    setup = open_setup(tiny_recipe(data=data, train={"objective": "dpo"}), Accelerator())
    show_data.samples(setup)
    text = out.getvalue()
    assert text.index(f"{path}:1, chosen") < text.index("‹good") < text.index(f"{path}:1, rejected")
    assert text.index("rejected") < text.index("‹bad")


@pytest.mark.parametrize(("label", "title"), [(None, "x"), (True, "x, good answer")])
def test_labels_are_shown(label, title, tiny_recipe, screen):
    out = screen()
    setup = open_setup(tiny_recipe(), Accelerator())
    samples = [Sample("x", [40, 41], [0.0, 1.0], label=label)]
    data = replace(setup.data, feed=SimpleNamespace(samples=samples))
    show_data.samples(replace(setup, data=data))
    assert f" {title} " in out.getvalue()


def test_the_histogram_is_to_scale(tiny_recipe, screen):
    out = screen()
    setup = open_setup(tiny_recipe(), Accelerator())
    show_data.data(setup)
    lines = out.getvalue().splitlines()
    found = setup.data.summary["train"]
    assert lines[1].startswith(f"12 samples, {found['tokens']} tokens, ")
    assert f"{found['supervised_share']:.1%} of them learned" in lines[1]
    counts, width = found["histogram"]["counts"], found["histogram"]["width"]
    bars = lines[2 : 2 + len(counts)]
    assert [int(line.split()[-1]) for line in bars] == counts
    assert bars[1].split()[0] == f"{width}-{2 * width - 1}"
    full = [line.count("█") for line in bars]
    assert full == [count * show_data.BAR_WIDTH // max(counts) for count in counts]


def test_notes_are_few_and_no_markup(tiny_recipe, screen, tmp_path):
    # rich would take it for the end of something bold
    folder = tmp_path / "[" / "bold]"
    folder.mkdir(parents=True)
    source = written(folder, *[talk("same", "text")] * 9, talk("other", "text " * 300))
    out = screen()
    data = {"train": source, "test": None, "overlong": "truncate", "max_length": 250}
    show_data.notes(open_setup(tiny_recipe(data=data), Accelerator()))
    cut, same = out.getvalue().splitlines()
    beginning = f"note: 1 of 14 rows (7%): {source}:10: cut at data.max_length, without its last "
    assert cut.startswith(beginning)
    assert same == (
        "note: 8 rows: " + "".join(f"{source}:{n}: the same as {source}:1; " for n in (2, 3, 4))
    ) + ("and 5 more")


def test_rows_left_out_are_told_with_their_share(tiny_recipe, screen, tmp_path):
    rows = [talk("a", "b"), *[talk(f"{i}", "text " * 300) for i in range(5)]]
    data = {"train": written(tmp_path, *rows), "test": None, "overlong": "drop"}
    out = screen()
    show_data.notes(open_setup(tiny_recipe(data={**data, "max_length": 250}), Accelerator()))
    assert out.getvalue().startswith("note: 5 of 10 rows (50%): ")
    assert "left out: longer than data.max_length; and 2 more" in out.getvalue()


def test_nothing_to_note(tiny_recipe, screen):
    out = screen()
    show_data.notes(open_setup(tiny_recipe(), Accelerator()))
    assert out.getvalue() == ""
