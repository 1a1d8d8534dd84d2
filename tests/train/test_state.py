"""Checkpoints: a run that goes on from one takes the very steps it would have taken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtune.data.chat import Sample
from qtune.data.rows import Row
from qtune.errors import UserError
from qtune.recipe import Train
from qtune.train import state as checkpoint
from qtune.train.optim import adamw
from qtune.train.state import State

CPU = torch.device("cpu")
SETTINGS = Train(steps=1, lr=0.01, weight_decay=0.1)


def net() -> nn.Sequential:
    """A frozen layer, then trained ones of both kinds of decay, with dropout between."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.LayerNorm(6))
    model[0].requires_grad_(False)
    return model


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, num: int) -> list[float]:
    losses = []
    for i in range(num):
        loss = model(torch.full((4, 6), 0.1 * i + 1)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save(folder: Path, step: int = 3, keep: int = 2, model: nn.Module | None = None) -> Path:
    model = model or net()
    optimizer = adamw(model.parameters(), SETTINGS)
    steps(model, optimizer, 2)
    state = State("data", 1, step, tokens=70, supervised_tokens=30, seconds=0.1 + 0.2)
    return checkpoint.save(folder, state, model, optimizer, [checkpoint.rng_state(CPU)], keep)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}::{key}"] = value.clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_goes_on_bit_for_bit_with_dropout_and_moments(tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model.parameters(), SETTINGS)
    steps(model, optimizer, 3)
    rng = [checkpoint.rng_state(CPU)]
    saved = checkpoint.save(tmp_path, State("data", 1, 3), model, optimizer, rng, 2)
    at_save = tensors(model, optimizer)
    losses = steps(model, optimizer, 4)
    expected = tensors(model, optimizer)

    resumed = net()
    another = adamw(resumed.parameters(), SETTINGS)
    torch.manual_seed(99)
    checkpoint.restore(saved, resumed, another)
    assert same(tensors(resumed, another), at_save)
    checkpoint.restore_rng(saved, 0, CPU)
    assert steps(resumed, another, 4) == losses
    assert same(tensors(resumed, another), expected)


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(save(tmp_path) / "adapter.safetensors")
    assert saved.keys() == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_before_the_first_step(tmp_path: Path) -> None:
    # the loop saves once at the start, when AdamW has no moments yet
    model = net()
    optimizer = adamw(model.parameters(), SETTINGS)
    rng = [checkpoint.rng_state(CPU)]
    saved = checkpoint.save(tmp_path, State("data", 1), model, optimizer, rng, 2)
    losses = steps(model, optimizer, 2)
    resumed = net()
    another = adamw(resumed.parameters(), SETTINGS)
    checkpoint.restore(saved, resumed, another)
    checkpoint.restore_rng(saved, 0, CPU)
    assert steps(resumed, another, 2) == losses


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    assert checkpoint.read(save(tmp_path)) == State("data", 1, 3, 70, 30, 0.1 + 0.2)


def test_each_process_gets_its_own_random_numbers(tmp_path: Path) -> None:
    model = net()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(checkpoint.rng_state(CPU))
    optimizer = adamw(model.parameters(), SETTINGS)
    saved = checkpoint.save(tmp_path, State("data", 2), model, optimizer, states, 2)
    for rank, seed in ((1, 2), (0, 1)):
        checkpoint.restore_rng(saved, rank, CPU)
        found = torch.rand(3)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.rand(3))


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (2, 900, 1000, 999_999, 1_000_000):
        save(tmp_path, step, keep=3)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-001000", "step-999999", "step-1000000"]
    save(tmp_path, 1_000_001, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1000001"]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path)
    model = net()
    model[2].weight.data.fill_(7)
    saved = save(tmp_path, model=model)
    resumed = net()
    checkpoint.restore(saved, resumed, adamw(resumed.parameters(), SETTINGS))
    assert torch.equal(resumed[2].weight, model[2].weight)
    assert checkpoint.read(saved).step == 3


def test_what_a_killed_save_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    whole = save(tmp_path, 3)
    left = tmp_path / ".step-000005.4711"
    left.mkdir()
    (left / "adapter.safetensors").write_bytes(b"half")
    assert checkpoint.checkpoints(tmp_path) == [whole]
    assert checkpoint.resumed(tmp_path, State("data", 1)).step == 3
    save(tmp_path, 6)
    assert not left.exists()


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
def test_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    saved = save(tmp_path)
    assert {path.name for path in saved.iterdir()} == set(FILES)
    damage(saved / name)
    with pytest.raises(UserError, match=f"{saved / name} is corrupt.* remove {saved} to resume"):
        checkpoint.read(saved)


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


def test_another_adapter_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path)
    model = net()
    model[3].requires_grad_(False)
    with pytest.raises(UserError, match=r"holds another adapter: 3\.bias, 3\.weight differ"):
        checkpoint.restore(saved, model, adamw(model.parameters(), SETTINGS))


def sample(ids: list[int], supervised: list[bool]) -> Sample:
    return Sample(Row("t", 1, []), ids, supervised)


def test_where_a_run_starts(tmp_path: Path) -> None:
    samples = [sample([1, 2], [False, True]), sample([3, 4], [False, True])]
    start = checkpoint.fresh(samples, 1)
    assert checkpoint.resumed(tmp_path / "none", start) == start and start.step == 0
    model = net()
    optimizer = adamw(model.parameters(), SETTINGS)
    made = State(start.data_sha256, 1, 5)
    checkpoint.save(tmp_path, made, model, optimizer, [checkpoint.rng_state(CPU)], 2)
    assert checkpoint.resumed(tmp_path, start) == made


@pytest.mark.parametrize(
    "changed",
    [
        [sample([1, 2], [False, True])],
        [sample([3, 4], [False, True]), sample([1, 2], [False, True])],
        [sample([1, 2], [True, True]), sample([3, 4], [False, True])],
        [sample([1, 2, 3], [False, True, False]), sample([4], [True])],
    ],
    ids=["fewer", "other order", "other mask", "other bounds"],
)
def test_other_data_is_refused(tmp_path: Path, changed: list[Sample]) -> None:
    samples = [sample([1, 2], [False, True]), sample([3, 4], [False, True])]
    model = net()
    optimizer = adamw(model.parameters(), SETTINGS)
    state = checkpoint.fresh(samples, 1)
    checkpoint.save(tmp_path, state, model, optimizer, [checkpoint.rng_state(CPU)], 2)
    with pytest.raises(UserError, match="the training data has changed"):
        checkpoint.resumed(tmp_path, checkpoint.fresh(changed, 1))
    with pytest.raises(UserError, match="with 2 processes: it was written with 1"):
        checkpoint.resumed(tmp_path, checkpoint.fresh(samples, 2))
