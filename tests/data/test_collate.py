"""Batches against the usual padded labels, shifted by one, sample by sample."""

import random
from itertools import accumulate

import pytest
import torch

from qtune.data.chat import Sample
from qtune.data.collate import collate
from qtune.data.rows import Row


def sample(ids, supervised, number=1):
    return Sample(Row("x.jsonl", number, []), ids, [bool(s) for s in supervised])


def test_two_samples():
    batch = collate([sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1], number=2)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.lengths == [3, 2]
    assert batch.predicts.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert [row.number for row in batch.rows] == [1, 2]


def test_dtypes():
    batch = collate([sample([5, 6], [0, 1])])
    for tensor in (batch.input_ids, batch.position_ids, batch.targets, batch.predicts):
        assert tensor.dtype == torch.int64


def test_device():
    batch = collate([sample([5, 6], [0, 1])], "meta")
    assert batch.input_ids.device.type == batch.targets.device.type == "meta"


def test_first_token_is_never_a_target():
    """Its predecessor in the row belongs to another sample."""
    batch = collate([sample([5, 6], [1, 1]), sample([8, 9], [1, 0])])
    assert batch.targets.tolist() == [6]


def test_no_target():
    batch = collate([sample([5, 6], [0, 0])])
    assert batch.targets.shape == batch.predicts.shape == (0,)
    assert batch.targets.dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_context_and_target_equal_those_of_padded_labels(seed):
    draw = random.Random(seed)
    samples = []
    for _ in range(draw.randint(1, 6)):
        length = draw.randint(1, 9)
        ids = [draw.randrange(100) for _ in range(length)]
        samples.append(sample(ids, [False] + [draw.random() < 0.5 for _ in ids[1:]]))
    expected = [
        (s.ids[:i], s.ids[i]) for s in samples for i in range(len(s.ids)) if s.supervised[i]
    ]

    batch = collate(samples)
    row = batch.input_ids[0].tolist()
    starts = accumulate(batch.lengths, initial=0)
    start_of = [start for start, n in zip(starts, batch.lengths, strict=False) for _ in range(n)]
    contexts = [row[start_of[at] : at + 1] for at in batch.predicts.tolist()]
    assert list(zip(contexts, batch.targets.tolist(), strict=True)) == expected


def test_filling_up_adds_a_sample_without_targets():
    parts = [sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1], number=2)]
    plain, filled = collate(parts), collate(parts, multiple=8)
    assert filled.input_ids.shape == filled.position_ids.shape == (1, 8)
    assert filled.lengths == [3, 2, 3]
    assert filled.position_ids[0, 5:].tolist() == [0, 1, 2]
    assert torch.equal(filled.input_ids[:, :5], plain.input_ids)
    assert torch.equal(filled.predicts, plain.predicts)
    assert torch.equal(filled.targets, plain.targets)
    assert collate(parts, multiple=5).lengths == [3, 2]
