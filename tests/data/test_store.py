import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qtune.cache import cache_folder
from qtune.data import store, writer
from qtune.data.chunk import Hashes
from qtune.data.sample import Sample
from qtune.data.store import Samples, collected, joined, opened, stored
from qtune.errors import UserError

KEY = "0123456789abcdef" * 4


pytestmark = pytest.mark.usefixtures("empty_cache")


def make(count, first=0):
    """Samples of different lengths."""
    return [
        Sample(f"x:{i}", list(range(i, 2 * i + 2)), [0.0, *[1.0] * (i + 1)])
        for i in range(first, first + count)
    ]


def keep(samples, name="x", key=KEY, notes=None):
    def fill(out):
        for number, sample in enumerate(samples):
            out.add(sample, Hashes(number + 1, 7))
        return notes or {}

    return stored(name, key, fill)


def never(_):
    raise AssertionError("made again")


def test_samples_and_notes_come_back():
    samples = make(9)
    made = keep(samples, notes={"odd": [1, "two"]})
    assert list(made.samples) == samples and made.notes == {"odd": [1, "two"]}
    again = stored("x", KEY, never)
    assert list(again.samples) == samples and again.notes == made.notes
    assert again.samples.sha256 == made.samples.sha256


def test_the_folder_has_the_name_and_the_key():
    keep(make(1), name="train.jsonl")
    (folder,) = (cache_folder() / "data").glob("train*")
    assert folder.name == f"train.jsonl-{KEY[:16]}"


def test_many_record_batches_read_as_one_sequence(monkeypatch):
    monkeypatch.setattr(writer, "BATCH_TOKENS", 40)
    samples = make(30)
    made = keep(samples).samples
    assert len(made._chunks) > 5
    assert list(made) == samples and made[-1] == samples[-1]
    assert made.lengths.tolist() == [sample.num_tokens for sample in samples]
    assert made.num_targets.tolist() == [sample.num_targets for sample in samples]
    assert made.whole.tolist() == list(range(1, 31)) and set(made.prompt) == {7}
    with pytest.raises(IndexError):
        made[30]


def test_lengths_are_known_without_touching_a_sample(monkeypatch):
    made = keep(make(5)).samples
    monkeypatch.setattr(Samples, "__getitem__", None)
    assert made.lengths.sum() == 20 and made.num_targets.sum() == 15


def test_a_slice_and_a_selection_are_samples_too():
    samples = make(10)
    made = keep(samples).samples
    assert list(made[2:8:3]) == samples[2:8:3]
    chosen = made.select([7, 0, 7])
    assert list(chosen) == [samples[7], samples[0], samples[7]]
    assert chosen.lengths.tolist() == [sample.num_tokens for sample in chosen]
    assert list(chosen[1:]) == [samples[0], samples[7]]
    assert len(made.select([])) == 0 and made.select([]).lengths.tolist() == []


def test_joined_parts_are_one_after_the_other():
    samples = make(10)
    one, two = collected((s, Hashes(1, 1)) for s in samples[:6]), keep(samples[6:]).samples
    both = joined([one.select([5, 1]), two])
    assert list(both) == [samples[5], samples[1], *samples[6:]]
    assert both.lengths.tolist() == [sample.num_tokens for sample in both]
    assert both.whole.dtype == np.uint64
    assert joined([two]) is two


def test_the_hash_is_that_of_the_content():
    samples = make(4)
    base = keep(samples, key="a" * 64).samples
    elsewhere = [Sample("other:1", s.ids, s.weights) for s in samples]
    assert keep(elsewhere, key="b" * 64).samples.sha256 == base.sha256
    last = samples[-1]
    others = [
        Sample("x", [*last.ids[:-1], 99], last.weights),
        Sample("x", last.ids, [*last.weights[:-1], 0.5]),
        Sample("x", last.ids, last.weights, label=True),
        Sample("x", last.ids, last.weights, rejected=last),
    ]
    hashes = [collected((s, Hashes(1, 1)) for s in [*samples[:-1], o]).sha256 for o in others]
    hashes += [base[:3].sha256, base.select([1, 0, 2, 3]).sha256, base.sha256]
    assert len(set(hashes)) == len(hashes)


def test_in_memory_and_on_disk_are_the_same():
    samples = make(5)
    assert keep(samples).samples.sha256 == collected((s, Hashes(1, 1)) for s in samples).sha256


def test_no_samples():
    made = keep([]).samples
    assert len(made) == 0 and made.lengths.tolist() == []


def test_a_failure_leaves_nothing():
    def fail(out):
        out.add(make(1)[0])
        raise UserError("a bad row")

    with pytest.raises(UserError, match="a bad row"):
        stored("x", KEY, fail)
    assert not list(cache_folder().rglob("*.arrow"))
    assert list(keep(make(2)).samples) == make(2)


@pytest.mark.parametrize("damage", ["cut", "no notes", "no samples", "other notes"])
def test_a_damaged_folder_is_named(damage):
    keep(make(3))
    (folder,) = (cache_folder() / "data").glob("x-*")
    arrow, notes = folder / store.SAMPLES, folder / store.NOTES
    match damage:
        case "cut":
            os.truncate(arrow, arrow.stat().st_size - 10)
        case "no notes":
            notes.unlink()
        case "no samples":
            arrow.unlink()
        case "other notes":
            notes.write_text("[]")
    with pytest.raises(UserError, match=r"data.x-0123456789abcdef is damaged .*remove the folder"):
        opened(folder)


SLOW = """
import sys, time
from qtune.data.sample import Sample
from qtune.data.store import stored

def fill(writer):
    for number in range(3):
        writer.add(Sample(f"x:{number}", [1, 2], [0.0, 1.0]))
        writer._flush()
        print("added", flush=True)
        time.sleep(float(sys.argv[2]))
    return {}

builds = sys.argv[3] == "builds"
made = stored("x", sys.argv[1], fill, builds=builds)
print("read", len(made.samples))
"""


def start(pause, builds):
    command = [sys.executable, "-c", SLOW, KEY, str(pause), builds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_is_read():
    process = start(60, "builds")
    assert process.stdout.readline() == "added\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((cache_folder() / "data").glob("x-*"))
    assert list(keep(make(4)).samples) == make(4)
    assert [path.name for path in (cache_folder() / "data").glob("*partial*")] == []


def test_one_process_makes_it_and_the_others_wait_for_its_file():
    others = [start(0, "waits") for _ in range(2)]
    time.sleep(0.5)
    maker = start(0.2, "builds")
    read = [process.communicate(timeout=60)[0].split("\n") for process in (maker, *others)]
    assert read[0] == ["added"] * 3 + ["read 3", ""]
    assert read[1] == read[2] == ["read 3", ""]


def test_a_sample_takes_microseconds():
    samples = [Sample(f"x:{i}", list(range(400)), [0.0] * 200 + [1.0] * 200) for i in range(500)]
    made = keep(samples).samples
    made[0]
    # the fastest of several rounds: what else the machine does is not at issue
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        for index in range(500):
            made[index]
        rounds.append((time.perf_counter() - begin) / 500)
    # 12 µs were measured
    assert min(rounds) < 100e-6
