"""Finished blocks on the disk."""

import pytest
import torch

from qtune.errors import UserError
from qtune.model.calibration.block import Outcome
from qtune.model.calibration.fit import Figures
from qtune.model.calibration.kept import Kept

CPU = torch.device("cpu")


def outcome(number):
    figures = Figures(f"{number}.q", "int4", "gptq", 0.1, None, 2.0, ("odd",))
    start = torch.full((2, 4), float(number)), torch.ones(3, 2)
    tensors = {f"{number}.q.weight": torch.tensor([number], dtype=torch.uint8)}
    return Outcome(tensors, {f"{number}.q": start}, [figures])


def test_what_was_added_is_there(tmp_path):
    kept = Kept(tmp_path / "blocks")
    assert kept.num_blocks() == 0 and not list(kept.tensors()) and not kept.starts()
    for number in range(3):
        hidden = [torch.full((1, n, 4), number + 0.5, dtype=torch.bfloat16) for n in range(1, 13)]
        kept.add(outcome(number), hidden)
    again = Kept(tmp_path / "blocks")
    assert again.num_blocks() == 3
    assert [name for name, _ in again.tensors()] == ["0.q.weight", "1.q.weight", "2.q.weight"]
    assert torch.equal(again.starts()["2.q"][0], torch.full((2, 4), 2.0))
    assert [layer["notes"] for layer in again.figures()] == [["odd"]] * 3
    found = again.hidden(CPU)
    assert all(torch.equal(a, b) for a, b in zip(found, hidden, strict=True))
    assert len(list((tmp_path / "blocks").glob("hidden-*"))) == 1


def test_block_that_was_cut_off_does_not_count(tmp_path):
    kept = Kept(tmp_path)
    kept.add(outcome(0), [torch.zeros(1, 2, 4)])
    kept.add(outcome(1), [torch.ones(1, 2, 4)])
    (tmp_path / "figures-00001.json").unlink()
    assert kept.num_blocks() == 1
    assert [name for name, _ in kept.tensors()] == ["0.q.weight"]


def test_full_disk_is_told(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("qtune.model.calibration.kept.save_file", full)
    with pytest.raises(UserError, match=r"tensors-00000\.safetensors cannot be written \(No space"):
        Kept(tmp_path).add(outcome(0), [])
