"""Checkpoints on disk: whole or not there, and what is not as it was written is never used."""

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtune.errors import UserError
from qtune.train import state as checkpoint
from qtune.train.state import State

TENSORS = {
    "adapter": {"a": torch.arange(6.0).view(2, 3)},
    "optimizer": {"a::step": torch.tensor(3.0)},
    "rng": {"rank_0": torch.arange(9, dtype=torch.uint8)},
}


def save(folder: Path, step: int = 3, keep: int = 2, **fields: Any) -> Path:
    return checkpoint.save(folder, State("data", 1, step, **fields), TENSORS, keep)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    fields = {"tokens": 70, "supervised_tokens": 30, "seconds": 0.1 + 0.2, "looked": 2}
    nested = {"feed": {"at": [1, 2]}, "watch": {"norms": [0.1, 1e-30], "best_loss": None}}
    saved = save(tmp_path, stopped=True, **fields, **nested)
    assert checkpoint.read(saved) == State("data", 1, 3, stopped=True, **fields, **nested)


def test_tensors_come_back_exactly(tmp_path: Path) -> None:
    saved = save(tmp_path)
    for name, tensors in TENSORS.items():
        found = checkpoint.load(saved, name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert checkpoint.load(saved, "average") == {}


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 900, 1000, 999_999, 1_000_000):
        save(tmp_path, step, keep=3)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-001000", "step-999999", "step-1000000"]
    save(tmp_path, 1_000_001, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000001"]


def test_later_ones_were_passed_over_and_go(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    save(tmp_path, 3, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-000002",
        "step-000003",
    ]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    saved = save(tmp_path, tokens=7)
    assert checkpoint.checkpoints(tmp_path) == [saved] and checkpoint.read(saved).tokens == 7


def test_what_a_killed_save_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    left = tmp_path / ".step-000005.4711"
    left.mkdir()
    (left / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.checkpoints(tmp_path) == [whole]
    assert checkpoint.resumed(tmp_path, State("data", 1)).step == 3
    save(tmp_path, 6)
    assert not left.exists()


@pytest.mark.parametrize("call", ["rename", "rmdir", "unlink"])
def test_a_checkpoint_is_there_whatever_call_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The process dies before the n-th call that changes names, for every n."""
    for count in range(40):
        folder = tmp_path / str(count)
        save(folder, 2, keep=1)
        with monkeypatch.context() as patch:
            left = dies_after(patch, call, count)
            with suppress(SystemExit):
                save(folder, 4, keep=1)
        found = checkpoint.resumed(folder, State("data", 1))
        assert found.step in (2, 4)
        if left():
            return
    pytest.fail("the save never came to its end")


def dies_after(patch: pytest.MonkeyPatch, call: str, count: int) -> Callable[[], int]:
    true, left = getattr(os, call), [count]

    def limited(*arguments: Any, **options: Any) -> None:
        if not left[0]:
            raise SystemExit
        left[0] -= 1
        true(*arguments, **options)

    patch.setattr(os, call, limited)
    return lambda: left[0]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-000003 cannot be written .*No space left.*--resume"):
        save(tmp_path)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]) and None,
    "empty": lambda path: path.write_bytes(b"") and None,
    "gone": lambda path: path.unlink(),
}
FILES = ["adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path, 2)
    saved = save(tmp_path, 3)
    assert {path.name for path in saved.iterdir()} == set(FILES)
    damage(saved / name)
    with pytest.raises(UserError, match=f"{saved / name} is corrupt"):
        checkpoint.read(saved)
    assert checkpoint.resumed(tmp_path, State("data", 1)).step == 2
    said = capsys.readouterr().out
    assert f"{saved / name} is corrupt" in said and "going on from" in said


def test_a_run_without_a_whole_one_is_not_started_over(tmp_path: Path) -> None:
    for step in (2, 3):
        (save(tmp_path / "checkpoints", step) / "state.json").unlink()
    with pytest.raises(UserError) as error:
        checkpoint.resumed(tmp_path / "checkpoints", State("data", 1))
    words = str(error.value)
    assert "step-000002" in words and "step-000003" in words and f"remove {tmp_path} to do" in words


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "{}", '{"step": 3}'])
def test_state_of_another_kind(tmp_path: Path, content: str) -> None:
    saved = save(tmp_path)
    (saved / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json is corrupt"):
        checkpoint.read(saved)


def test_no_byte_of_the_state_may_change(tmp_path: Path) -> None:
    saved = save(tmp_path)
    path = saved / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "step": 4}))
    with pytest.raises(UserError, match=r"state\.json is corrupt"):
        checkpoint.read(saved)


def test_where_a_run_starts(tmp_path: Path) -> None:
    start = checkpoint.fresh(SimpleNamespace(sha256="abc"), 1)  # type: ignore[arg-type]
    assert start == State("abc", 1)
    assert checkpoint.resumed(tmp_path / "none", start) == start
    made = State("abc", 1, 5)
    checkpoint.save(tmp_path, made, TENSORS, 2)
    assert checkpoint.resumed(tmp_path, start) == made


def test_other_data_is_refused_unless_allowed(tmp_path: Path) -> None:
    save(tmp_path)
    other = State("other data", 1)
    with pytest.raises(UserError, match=r"the training data has changed.*--allow data"):
        checkpoint.resumed(tmp_path, other)
    found = checkpoint.resumed(tmp_path, other, other_data=True)
    assert (found.step, found.data_sha256) == (3, "other data")


def test_another_number_of_processes_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path)
    assert checkpoint.resumed(tmp_path, State("data", 1)).step == 3
    assert capsys.readouterr().out == ""
    found = checkpoint.resumed(tmp_path, State("data", 2))
    assert (found.step, found.num_processes) == (3, 2)
    said = capsys.readouterr().out
    assert "written by 1 processes and goes on with 2" in said and "not in every bit" in said
