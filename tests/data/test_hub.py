"""The hub is a monkeypatched `load_dataset`; what it returns are real data sets."""

import http.server
import threading

import datasets
import pytest

from qtune.data.hub import HubData
from qtune.errors import UserError

ROWS = [{"text": f"{i}", "meta": {"lang": "en" if i % 2 else None}} for i in range(5)]


@pytest.mark.parametrize(
    ("given", "name", "config", "split"),
    [
        ("org/name", "org/name", None, "train"),
        ("org/name:test", "org/name", None, "test"),
        ("org/na.me-2:main:test", "org/na.me-2", "main", "test"),
        ("org/name:train[:10%]", "org/name", None, "train[:10%]"),
        ("org/name:main:train[5:10]", "org/name", "main", "train[5:10]"),
    ],
)
def test_names(given, name, config, split):
    assert HubData.parse(given, "v1") == HubData(given, name, config, split, "v1")


@pytest.mark.parametrize(
    "given", ["name", "a/b/c", "./org/name", "org/name:", "/org/name", "a/b c"]
)
def test_other_names(given):
    assert HubData.parse(given, None) is None


@pytest.fixture
def hub(monkeypatch):
    """Calls of load_dataset; it loads ROWS, or raises what is put into `error`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    calls = []

    def load_dataset(*names, streaming, **options):
        calls.append((*names, options))
        if isinstance(hub.error, Exception):
            raise hub.error
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if streaming else rows

    def hub():
        return calls

    hub.error = None
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("skip", [0, 3, 5])
def test_records(hub, streaming, skip):
    data = HubData.parse("org/name:main:test", "v1")
    expected = [
        (i + 1, {"text": f"{i}", "meta": {"lang": "en"} if i % 2 else {}}) for i in range(5)
    ]
    assert list(data.records(skip, streaming=streaming)) == expected[skip:]
    assert hub() == [("org/name", "main", {"split": "test", "revision": "v1"})]


def test_streaming_takes_no_part_of_a_split(hub):
    data = HubData.parse("org/name:train[:10%]", None)
    with pytest.raises(
        UserError, match="a part of a split cannot be streamed; name the split alon"
    ):
        next(data.records(0, streaming=True))
    assert hub() == []


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("x"),
            r"org/name:dev: no such data set on the hub, or it needs a login \(`hf auth login`\)",
        ),
        (ValueError('Unknown split "dev".'), 'cannot be loaded from the hub: Unknown split "dev".'),
        (OSError("no space"), "cannot be loaded from the hub: no space"),
        (ValueError("Config name is missing."), "is missing.; write org/name:CONFIG:dev"),
        (datasets.exceptions.DatasetGenerationError("bad"), "cannot be loaded from the hub: bad"),
    ],
)
def test_what_the_library_raises(hub, error, problem):
    hub.error = error
    with pytest.raises(UserError, match=problem):
        next(HubData.parse("org/name:dev", None).records(0, streaming=False))


class Builder:
    hash = "c0ffee"

    class config:
        name = "main"


def test_fingerprint(hub, monkeypatch):
    asked = []

    def load_dataset_builder(*names, **options):
        asked.append((*names, options))
        return Builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert HubData.parse("org/name:main:test", "v1").fingerprint() == "main c0ffee"
    assert asked == [("org/name", "main", {"revision": "v1"})]


@pytest.fixture
def online(monkeypatch):
    def online(endpoint):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)

    return online


def test_unreachable_hub(online):
    """Nothing listens on port 9 of this machine; the answer has to come without retries."""
    online("http://127.0.0.1:9")
    data = HubData.parse("org/name:train", None)
    with pytest.raises(UserError, match=r"org/name:train: no such local file, and the hub .*127"):
        next(data.records(0, streaming=False))
    with pytest.raises(UserError, match="cannot be reached"):
        data.fingerprint()


class Silent(http.server.BaseHTTPRequestHandler):
    """Takes the request and answers far too late."""

    asked = threading.Event()
    leave = threading.Event()

    def do_HEAD(self):
        self.asked.set()
        self.leave.wait(5)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_silent_hub(online, monkeypatch):
    monkeypatch.setattr("qtune.data.hub.TIMEOUT_S", 0.2)
    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as server:
        online(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            with pytest.raises(UserError, match="cannot be reached"):
                next(HubData.parse("org/name", None).records(0, streaming=False))
        finally:
            Silent.leave.set()
            thread.join()
    assert Silent.asked.is_set()


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_a_hub_that_answers_anything_is_there(hub, online):
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        online(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        records = list(HubData.parse("org/name", None).records(0, streaming=False))
        thread.join()
    assert len(records) == len(ROWS)
