"""Golden prompts played again, and what is said of the answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtune.errors import UserError
from qtune.export.folder.golden import MAX_CHANGE, Replay, Swap
from qtune.model.load import load_tokenizer
from qtune.serving import replay

CPU = torch.device("cpu")


@pytest.fixture
def folder(exported: Callable[..., Path]) -> Path:
    return exported("adapter")


@pytest.fixture
def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "qtune.json").read_text())
    return found


def test_adapter_finds_its_base(folder: Path, written: dict[str, Any], base: Path) -> None:
    assert written["base"]["model"] == str(base)
    model = replay.load(folder, written, None, None, CPU)
    found = replay.replays(model, written)
    assert len(found) == 2 and all(one.first is None and one.change < 1e-3 for one in found)
    with model.disable_adapter():
        assert all(one.change > MAX_CHANGE for one in replay.replays(model, written))


def test_base_that_is_not_there_is_asked_for(folder: Path, written: dict[str, Any]) -> None:
    written["base"]["model"] = "/nowhere/model"
    with pytest.raises(UserError, match=r"the adapter's base: .*; or name its folder with --base"):
        replay.load(folder, written, None, None, CPU)


def test_base_is_the_one_that_was_trained_on(written: dict[str, Any], base: Path) -> None:
    assert replay.base_differences(written, base) == []
    written["base"]["sha256"] = "0" * 64
    (found,) = replay.base_differences(written, base)
    assert found.what.endswith("and was 0000000000000000")
    assert replay.base_differences(written | {"form": "merged"}, base) == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Replay(0.05), []),
        (Replay(0.2), ["log-probabilities moved by 0.200 nats (limit 0.1)"]),
        (Replay(float("nan")), ["log-probabilities moved by nan nats (limit 0.1)"]),
        (
            Replay(0.0, Swap(3, 0, 2)),
            ["token 4 of the answer is 2 ('<|im_end|>'), and was 0 ('<|endoftext|>')"],
        ),
    ],
)
def test_what_is_told(found: Replay, expected: list[str], folder: Path) -> None:
    told = replay.told(7, found, load_tokenizer(folder))
    assert [difference.what for difference in told] == expected
    assert all(difference.where == "golden prompt 7" for difference in told)
