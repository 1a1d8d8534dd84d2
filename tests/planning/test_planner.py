import json
from pathlib import Path

import pytest
import yaml

from qtune.errors import UserError
from qtune.planning.planner import plan

# the tiny model's head is tied, of which PEFT warns
pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True.*:UserWarning")


@pytest.fixture
def configuration(tiny_model, tmp_path):
    """A folder with two configurations of a family, and no weights."""
    text = json.loads((tiny_model / "config.json").read_text())
    for name, width in (("small", 64), ("large", 128)):
        (tmp_path / "family" / name).mkdir(parents=True)
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
        (tmp_path / "family" / name / "config.json").write_text(json.dumps(text | sizes))
    return tmp_path / "family"


def test_a_family_is_planned_from_configurations(configuration, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    found = plan([str(configuration)], "2GiB", 64, serve=True, out=out, formats=["int8", "int3"])
    assert {it.footprint.name for it in found.candidates} == {
        str(configuration / "small"),
        str(configuration / "large"),
    }
    assert found.chosen.footprint.label == "large"
    assert yaml.safe_load(out.read_text())["model"] == str(configuration / "large")
    shown = capsys.readouterr().out
    for words in ("large", "small", "take ", "memory ", "largest ", "rows of 64 tokens", "int3"):
        assert words in shown
    assert out.read_text() in shown


@pytest.mark.parametrize("serve", [True, False])
def test_a_file_is_a_model_too(configuration, serve, capsys):
    path = configuration / "small" / "config.json"
    found = plan([str(path)], "1GB", 64, serve=serve, batch=2, formats=["nf4"])
    assert found.chosen.footprint.name == str(path)
    assert ("recompute" in capsys.readouterr().out) is not serve


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"context": 1}, "--context must be at least 2"),
        ({"kv_bits": 8}, "--kv-bits is for --serve"),
        ({"kv_bits": 3, "serve": True}, r"--kv-bits 3: take one of \(16, 8, 4, 2\)"),
        ({"formats": ["int5"]}, "unknown format 'int5'"),
        ({"memory": "24"}, "not a size"),
        ({"sense": Path("nowhere.jsonl")}, "no such file; `qtune sense MODEL"),
        ({"memory": "1KB"}, "the least is"),
    ],
)
def test_mistakes_are_said(configuration, arguments, words):
    given = {"memory": "1GB", "context": 64, "formats": ["nf4"]} | arguments
    with pytest.raises(UserError, match=words):
        plan([str(configuration / "small")], **given)


def test_what_is_no_configuration_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: no model configuration"):
        plan([str(tmp_path / "other.json")], "1GB", 64)
    with pytest.raises(UserError, match="no such folder or file"):
        plan([str(tmp_path / "missing/")], "1GB", 64)
