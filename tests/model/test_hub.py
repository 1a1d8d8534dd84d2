import hashlib
import http.server
import json
import socket
import threading
import time

import huggingface_hub
import pytest

from qtune.errors import UserError
from qtune.model import hub

COMMIT = "c" * 40


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that a download needs, for one model `org/name`."""

    files: dict[str, bytes]
    fetched: list[str]
    status = 200
    wait_s = 0.0

    def do_GET(self):
        time.sleep(self.wait_s)
        path = self.path.split("?")[0]
        if self.status != 200:
            self._send(b"", self.status)
        elif path == "/api/models":
            self._send(b"[]")
        elif path == "/api/models/org/name/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(info).encode())
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": self._tag(content)}
                for name, content in self.files.items()
            ]
            self._send(json.dumps(entries).encode())
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
            self.fetched.append(name)
            self._send(self.files[name])
        else:
            self._send(b"", 404)

    do_HEAD = do_GET

    def _tag(self, content):
        return hashlib.sha1(content).hexdigest()

    def _send(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{self._tag(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    handler = type("Handler", (FakeHub,), {"files": {}, "fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # read from the environment once, which tests/conftest.py sets
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield handler
    server.shutdown()
    server.server_close()


def test_only_safe_files_are_fetched_and_the_cache_serves_the_next_call(
    fake_hub, make_folder, monkeypatch
):
    wanted = {file.name: file.read_bytes() for file in make_folder().iterdir()}
    unwanted = {
        "pytorch_model.bin": b"x",
        "onnx/model.safetensors": b"x",
        "consolidated.safetensors": b"x",
    }
    fake_hub.files = {**wanted, **unwanted}
    assert hub.cached_snapshot("org/name", None) is None
    folder = hub.download_snapshot("org/name", None)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == wanted
    assert set(fake_hub.fetched) == set(wanted)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert hub.cached_snapshot("org/name", None) == folder


def test_weights_are_left_out_where_nobody_wants_them(fake_hub, make_folder):
    fake_hub.files = {file.name: file.read_bytes() for file in make_folder().iterdir()}
    folder = hub.download_snapshot("org/name", None, weights=False)
    assert set(fake_hub.fetched) == {"config.json", "tokenizer.json"}
    assert hub.cached_snapshot("org/name", None, weights=False) == folder
    # which is no whole model
    assert hub.cached_snapshot("org/name", None) is None
    hub.download_snapshot("org/name", None)
    assert hub.cached_snapshot("org/name", None) == folder


def test_model_of_pickles_is_explained(fake_hub):
    fake_hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(UserError, match="no safetensors on the hub"):
        hub.download_snapshot("org/name", None)


def test_unknown_model(fake_hub):
    with pytest.raises(hub.HubError, match="gave no org/other"):
        hub.download_snapshot("org/other", None)


def test_broken_server_is_no_hub(fake_hub):
    fake_hub.status = 503
    assert "status 503" in hub.probe()


def test_refusal_of_the_probe_is_an_answer(fake_hub):
    fake_hub.status = 401
    assert hub.probe() is None


def test_silent_server_is_given_up(fake_hub, monkeypatch):
    fake_hub.wait_s = 2.0
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    assert hub.probe() is not None


def test_closed_port_and_offline_mode(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert hub.endpoint() == "http://127.0.0.1:9"
    with pytest.raises(hub.HubError, match="cannot be reached"):
        hub.download_snapshot("org/name", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.probe() == "HF_HUB_OFFLINE is set"


def test_address_that_is_none(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "cannot be reached" in hub.probe()


def test_server_that_speaks_something_else(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

        def talk():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        assert "cannot be reached" in hub.probe()
        thread.join()
