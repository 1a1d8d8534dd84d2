"""Batches against the usual padded labels, shifted by one, sample by sample."""

import random
from itertools import accumulate

import numpy as np
import pytest
import torch

from qtune.data.collate import collate
from qtune.data.sample import Sample


def sample(ids, weights, number=1, **fields):
    return Sample(f"x.jsonl:{number}", ids, [float(w) for w in weights], **fields)


def test_two_samples():
    batch = collate([sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1], number=2)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.lengths == [3, 2]
    assert batch.predicts.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.sample_of.tolist() == [0, 0, 1]
    assert batch.places == ["x.jsonl:1", "x.jsonl:2"]
    assert (batch.weights, batch.num_parts, batch.labels) == (None, [1, 1], [None, None])


def test_dtypes():
    batch = collate([sample([5, 6], [0, 0.5])])
    for tensor in (batch.input_ids, batch.position_ids, batch.targets, batch.predicts):
        assert tensor.dtype == torch.int64
    assert batch.sample_of.dtype == torch.int64 and batch.weights.dtype == torch.float32


def test_device():
    batch = collate([sample([5, 6], [0, 2])], "meta")
    for tensor in (batch.input_ids, batch.targets, batch.weights):
        assert tensor.device.type == "meta"
    assert batch.sample_of.device.type == "cpu"


def test_ids_of_mapped_files_are_copied():
    ids = np.array([5, 6, 7], np.int32)
    ids.flags.writeable = False
    batch = collate([Sample("x", ids, np.array([0, 1, 1], np.float32))])
    assert batch.input_ids.tolist() == [[5, 6, 7]]
    batch.input_ids[0, 0] = 1
    assert ids[0] == 5


def test_first_token_is_never_a_target():
    """Its predecessor in the row belongs to another sample."""
    batch = collate([sample([5, 6], [1, 1]), sample([8, 9], [1, 0])])
    assert batch.targets.tolist() == [6]


def test_weights():
    batch = collate([sample([5, 6, 7, 8], [0, 1, 0, 0.25]), sample([8, 9], [0, 2])])
    assert batch.targets.tolist() == [6, 8, 9]
    assert batch.weights.tolist() == [1, 0.25, 2]


def test_both_answers_of_a_preference_row_are_samples():
    pair = sample([1, 2, 3], [0, 0, 1], rejected=sample([1, 2, 4, 5], [0, 0, 1, 1]))
    batch = collate([sample([9, 8], [0, 1], label=True), pair])
    assert batch.input_ids.tolist() == [[9, 8, 1, 2, 3, 1, 2, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3]]
    assert (batch.lengths, batch.num_parts) == ([2, 3, 4], [1, 2])
    assert batch.targets.tolist() == [8, 3, 4, 5]
    assert batch.sample_of.tolist() == [0, 1, 2, 2]
    assert (batch.labels, len(batch.places)) == ([True, None], 2)


def test_no_target():
    batch = collate([sample([5, 6], [0, 0])])
    assert batch.targets.shape == batch.predicts.shape == batch.sample_of.shape == (0,)
    assert batch.targets.dtype == torch.int64 and batch.weights is None


def test_no_samples():
    batch = collate([], multiple=8)
    assert batch.input_ids.shape == (1, 0) and batch.lengths == []


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_context_and_target_equal_those_of_padded_labels(seed):
    draw = random.Random(seed)
    samples = []
    for _ in range(draw.randint(1, 6)):
        length = draw.randint(1, 9)
        ids = [draw.randrange(100) for _ in range(length)]
        samples.append(sample(ids, [0] + [draw.random() < 0.5 for _ in ids[1:]]))
    expected = [
        (s.ids[:i], s.ids[i], n)
        for n, s in enumerate(samples)
        for i in range(len(s.ids))
        if s.weights[i]
    ]

    batch = collate(samples)
    row = batch.input_ids[0].tolist()
    starts = accumulate(batch.lengths, initial=0)
    start_of = [start for start, n in zip(starts, batch.lengths, strict=False) for _ in range(n)]
    contexts = [row[start_of[at] : at + 1] for at in batch.predicts.tolist()]
    found = zip(contexts, batch.targets.tolist(), batch.sample_of.tolist(), strict=True)
    assert list(found) == expected


def test_filling_up_adds_a_sample_without_targets():
    parts = [sample([5, 6, 7], [0, 1, 1]), sample([8, 9], [0, 1], number=2)]
    plain, filled = collate(parts), collate(parts, multiple=8)
    assert filled.input_ids.shape == filled.position_ids.shape == (1, 8)
    assert filled.lengths == [3, 2, 3] and filled.num_parts == [1, 1]
    assert filled.position_ids[0, 5:].tolist() == [0, 1, 2]
    assert torch.equal(filled.input_ids[:, :5], plain.input_ids)
    assert torch.equal(filled.predicts, plain.predicts)
    assert torch.equal(filled.targets, plain.targets)
    assert collate(parts, multiple=5).lengths == [3, 2]
    # without packing it would be one more row
    assert collate(parts, multiple=8, packing=False).lengths == [3, 2]
