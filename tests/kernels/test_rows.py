import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtune_kernels import rows
from qtune_kernels.linear_tiles import most_fused_rows
from qtune_kernels.rows import ROOM, empty_rows, extended, room_behind, wanted_room, with_room

CPU = torch.device("cpu")
# more than fused kernels take
MANY = most_fused_rows(CPU) + 1


def made(num_rows: int = 6, columns: int = 10, room: int = 4) -> torch.Tensor:
    return with_room(num_rows, columns, torch.float32, CPU, room)


def test_there_is_room_behind_every_row() -> None:
    x = made().fill_(1.0)
    assert x.shape == (6, 10) and room_behind(x) == 4
    wide = extended(x, 3)
    assert wide.shape == (6, 13) and torch.equal(wide[:, :10], x)
    wide[:, 10:] = 7.0
    assert torch.equal(x, torch.ones(6, 10))
    assert x.untyped_storage().nbytes() == 6 * 14 * 4
    assert room_behind(with_room(2, 3, torch.bfloat16, CPU)) == ROOM


def test_views_of_whole_rows_keep_their_room() -> None:
    x = made()
    assert room_behind(x.view(2, 3, 10).reshape(-1, 10)) == 4
    assert room_behind(x[2:5]) == 4
    assert extended(x[2:5], 4).data_ptr() == x[2].data_ptr()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :8],
        lambda x: x[:, 2:],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x.view(2, 3, 10),
        lambda x: x.view(torch.int32),
        lambda x: x.clone(),
        lambda x: x.as_strided((5, 10), (14, 1), 2),
        lambda x: x.as_strided((6, 14), (14, 1)),
    ],
    ids=str,
)
def test_other_views_have_none(view) -> None:
    assert room_behind(view(made())) == 0


def test_rows_that_only_look_like_it_have_none() -> None:
    everything = torch.zeros(6, 14)
    slice_of_it = everything[:, :10]
    assert slice_of_it.stride() == made().stride()
    assert room_behind(slice_of_it) == 0
    with pytest.raises(ValueError, match="no room for 4"):
        extended(slice_of_it, 4)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for 5"):
        extended(made(), 5)


def test_a_storage_that_is_gone_is_forgotten() -> None:
    before = len(rows._layouts)
    x = made()
    assert len(rows._layouts) == before + 1
    part = x[1:]
    del x
    assert room_behind(part) == 4
    del part
    gc.collect()
    assert len(rows._layouts) == before


def test_rows_that_only_autograd_holds_are_remembered() -> None:
    x = made().fill_(2.0)
    y = torch.ones(6, 10, requires_grad=True).mul(x)
    node = y.grad_fn
    del x
    gc.collect()
    assert room_behind(node._saved_other) == 4


def test_writing_into_the_room_does_not_count_as_a_change() -> None:
    x = made().fill_(2.0)
    factor = torch.ones(6, 10, requires_grad=True)
    y = factor * x
    extended(x, 4)[:, 10:] = 5.0
    y.sum().backward()
    assert torch.equal(factor.grad, x)


def test_meta_rows_have_the_same_size() -> None:
    x = with_room(6, 10, torch.bfloat16, torch.device("meta"), 4)
    assert x.stride() == (14, 1) and x.untyped_storage().nbytes() == 6 * 14 * 2


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)], ids=str)
def test_results_have_room_on_cuda_alone(shape: tuple[int, ...], monkeypatch) -> None:
    like = torch.randn(shape).bfloat16()
    for x in (like, like.to("meta")):
        assert empty_rows(x, 8).is_contiguous() and room_behind(empty_rows(x, 8).view(-1, 40)) == 0
    monkeypatch.setattr(rows, "DEVICE", "cpu")
    result = empty_rows(like, 8)
    assert result.shape == shape and result.dtype == torch.bfloat16
    assert room_behind(result.reshape(-1, 40)) == 8
    assert empty_rows(like, 0).is_contiguous()


@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (3, 0)], ids=str)
def test_results_may_have_one_row_or_none(shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(rows, "DEVICE", "cpu")
    assert empty_rows(torch.empty(shape), 8).shape == shape


def test_results_lie_as_shape_functions_say() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 40, dtype=torch.float16, device="cuda")
        assert empty_rows(x, 8).stride() == (144, 48, 1)
        assert empty_rows(x, 0).stride() == (120, 40, 1)
        assert empty_rows(x.to("cpu"), 8).stride() == (120, 40, 1)


@pytest.mark.parametrize(
    ("shape", "room"),
    [
        ((MANY, 40), ROOM),
        ((2, MANY, 40), ROOM),
        ((MANY - 1, 40), 0),
        ((MANY, 36), 0),
        ((1, MANY, 2, 40), 0),
    ],
    ids=["rows", "batch", "few rows", "rows that start anywhere", "heads"],
)
def test_room_is_wanted_where_a_layer_can_use_it(shape, room: int, monkeypatch) -> None:
    x = torch.empty(shape)
    assert wanted_room(x) == 0
    monkeypatch.setattr(rows, "DEVICE", "cpu")
    assert wanted_room(x) == room


def test_compiled_code_asks_for_it_too(monkeypatch) -> None:
    monkeypatch.setattr(rows, "DEVICE", "cpu")
    compiled = torch.compile(lambda x: x + wanted_room(x), fullgraph=True, backend="aot_eager")
    for num_rows in (MANY, MANY + 1):
        assert torch.equal(compiled(torch.zeros(num_rows, 40)), torch.full((num_rows, 40), ROOM))
