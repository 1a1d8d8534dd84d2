import pyarrow as pa
import pytest

from qtune.data.chunk import Chunk, Hashes, columns, schema, weight_runs
from qtune.data.sample import Sample

PAIR = Sample(
    "p:1",
    [1, 2, 3],
    [0.0, 0.0, 1.0],
    num_cut=4,
    rejected=Sample("p:1", [1, 2, 5, 6], [0.0, 0.0, 1.0, 0.25], num_cut=7),
)
SAMPLES = [
    Sample("file.jsonl:1", [5, 6, 7, 8, 9], [0.0, 1.0, 1.0, 0.0, 0.3]),
    PAIR,
    Sample("x:3", [1, 2], [0.0, 1.0], label=True),
    Sample("x:4", [2**31 - 1], [0.0], label=False),
]


def chunk(samples=SAMPLES):
    hashes = [Hashes(2**64 - 1 - i, i) for i in range(len(samples))]
    batch = pa.RecordBatch.from_pydict(columns(zip(samples, hashes, strict=True)), schema=schema())
    return Chunk(batch)


def test_samples_come_back_as_they_were():
    made = chunk()
    assert [made.sample(i) for i in range(len(made))] == SAMPLES


def test_columns_are_those_of_the_samples():
    made = chunk()
    assert made.lengths.tolist() == [sample.num_tokens for sample in SAMPLES] == [5, 7, 2, 1]
    assert made.num_targets.tolist() == [sample.num_targets for sample in SAMPLES]
    assert made.labels.tolist() == [-1, -1, 1, 0]
    assert made.whole.tolist() == [2**64 - 1 - i for i in range(4)]
    assert made.prompt.tolist() == [0, 1, 2, 3]


def test_ids_are_plain_numbers():
    # numpy's would neither print as numbers nor go into JSON
    assert {type(value) for value in chunk().sample(0).ids} == {int}
    assert {type(value) for value in chunk().sample(0).weights} == {float}


@pytest.mark.parametrize(
    ("weights", "runs"),
    [
        ([], []),
        ([0.0, 0.0, 1.0], [(2, 0.0), (1, 1.0)]),
        ([1.0, 0.5, 0.5, 1.0], [(1, 1.0), (2, 0.5), (1, 1.0)]),
    ],
)
def test_runs_of_equal_weights(weights, runs):
    assert weight_runs(weights) == runs
