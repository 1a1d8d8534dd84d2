from types import SimpleNamespace

import pytest
import torch

from qtune.data.sample import Sample
from qtune.train.batches import Batches, nothing_learned, split_up


def sample(name: str, length: int) -> Sample:
    return Sample(name, list(range(1, length + 1)), [0.0] + [1.0] * (length - 1))


def all_batches(samples, num_processes, max_tokens, packing=True):
    """What each process goes through."""
    places = []
    for i in range(num_processes):
        accelerator = SimpleNamespace(
            num_processes=num_processes, process_index=i, device=torch.device("cpu")
        )
        batches = Batches(accelerator, max_tokens, packing=packing)
        places.append(list(batches(samples)))
    return places


@pytest.mark.parametrize("lengths", [[9] * 8, [90, 2, 3, 4, 2], [50, 50, 2], [7], [60, 1, 1, 1, 1]])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_every_row_once_in_as_many_batches_everywhere(lengths, num_processes, packing):
    samples = [sample(f"row {i}", length) for i, length in enumerate(lengths)]
    found = all_batches(samples, num_processes, 60, packing)
    assert len({len(batches) for batches in found}) == 1
    places = [place for batches in found for batch in batches for place in batch.places]
    assert sorted(places) == sorted(s.place for s in samples)
    targets = sum(len(batch.targets) for batches in found for batch in batches)
    assert targets == sum(length - 1 for length in lengths)


def test_full_groups_are_halved():
    groups = [[1, 2, 3, 4, 5], [6], [7, 8]]
    assert split_up(groups, 3) == groups
    assert split_up(groups, 5) == [[1, 2], [3], [4, 5], [6], [7, 8]]
    assert split_up(groups, 99) == [[i] for i in range(1, 9)]
    assert split_up([], 2) == []


def test_an_idle_batch_has_tokens_but_no_rows():
    (batch,) = all_batches([sample("a", 5)], 1, 60)[0]
    idle = nothing_learned(batch)
    assert torch.equal(idle.input_ids, batch.input_ids) and idle.lengths == batch.lengths
    assert len(idle.targets) == len(idle.predicts) == len(idle.sample_of) == 0
    assert idle.places == idle.num_parts == idle.labels == [] and idle.weights is None
