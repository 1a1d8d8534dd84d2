"""A server that speaks OpenAI's protocol, in front of a real model, wrong in many ways."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from qtune.data.chat import prompt_ids
from qtune.errors import UserError
from qtune.model.load import load_tokenizer
from qtune.serving.serve_check import check, serve_check

Served = Callable[..., str]


@dataclass
class Engine:
    """A model behind the protocol; the fields say what the server does wrong or leaves out."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    names: list[str] = field(default_factory=lambda: ["tuned"])
    stops: list[int] = field(default_factory=list)
    logprobs: str = "content"
    takes_ids: bool = True
    has_chat: bool = True
    shift: float = 0.0

    def reply(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.names]}
        assert body is not None and body["model"] in self.names and body["temperature"] == 0
        if path == "/v1/chat/completions":
            if not self.has_chat:
                return 404, {"error": "no such path"}
            ids = prompt_ids(self.tokenizer, body["messages"])
        elif isinstance(body["prompt"], str):
            ids = self.tokenizer(body["prompt"], add_special_tokens=False).input_ids
        elif self.takes_ids:
            ids = body["prompt"]
        else:
            return 400, {"error": "prompt must be text"}
        return 200, self._answer(ids, body["max_tokens"], chat="chat" in path)

    @torch.no_grad()
    def _answer(self, prompt: list[int], max_tokens: int, *, chat: bool) -> dict[str, Any]:
        made: list[int] = []
        values: list[float] = []
        stopped = False
        while len(made) < max_tokens and not stopped:
            logits = self.model(torch.tensor([prompt + made])).logits[0, -1]
            token = int(logits.argmax())
            stopped = token in self.stops
            if not stopped:
                made.append(token)
                values.append(float(logits.float().log_softmax(-1)[token]) + self.shift)
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        choice: dict[str, Any] = {"finish_reason": "stop" if stopped else "length"}
        choice |= {"message": {"content": text}} if chat else {"text": text}
        pairs = zip(made, values, strict=True)
        if self.logprobs == "content":
            content = [{"id": token, "token": "", "logprob": value} for token, value in pairs]
            choice["logprobs"] = {"content": content}
        elif self.logprobs == "lists":
            choice["logprobs"] = {"tokens": ["" for _ in made], "token_logprobs": values}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}


@pytest.fixture
def folder(exported: Callable[..., Path]) -> Path:
    return exported("bf16")


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., str]]:
    """Starts a server of the export, changed as the keywords say, and gives its address."""
    running = []
    written = json.loads((folder / "qtune.json").read_text())

    def start(change: Callable[[Engine], None] = lambda engine: None) -> str:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        engine = Engine(model, load_tokenizer(folder), stops=written["stop_ids"])
        change(engine)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(engine))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(None)

        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            self._send(json.loads(self.rfile.read(size)))

        def _send(self, body: dict[str, Any] | None) -> None:
            status, content = engine.reply(self.path, body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler


def told(url: str, folder: Path) -> list[str]:
    return [str(difference) for difference in serve_check(url, folder).differences]


@pytest.mark.parametrize("logprobs", ["content", "lists", "none"])
def test_right_server_passes(
    logprobs: str, serve: Served, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(lambda engine: setattr(engine, "logprobs", logprobs))
    report = serve_check(url, folder)
    assert report.differences == [] and report.notes == []
    assert [(number, way) for number, way, _ in report.answers] == [
        (1, "completion"), (1, "chat"), (2, "completion"), (2, "chat"),
    ]  # fmt: skip
    for _, _, found in report.answers:
        assert found.change is None if logprobs == "none" else found.change < 0.01
    check(f"{url}/v1", folder, "tuned")
    assert "tuned answers as it was measured to" in capsys.readouterr().out


def test_other_weights_are_told_by_their_first_token(serve: Served, folder: Path) -> None:
    def spoil(engine: Engine) -> None:
        engine.model.model.norm.weight.data.mul_(-1)

    url = serve(spoil)
    golden = json.loads((folder / "qtune.json").read_text())["golden"][0]
    first = golden["greedy_ids"][0]
    lines = told(url, folder)
    assert lines[0].startswith("golden prompt 1, completion: token 1 of the answer is ")
    assert f"and should be {first} (" in lines[0]
    with pytest.raises(UserError, match=r"does not serve what .* was measured to be"):
        check(url, folder)


def test_other_template_shows_in_the_chat_alone(serve: Served, folder: Path) -> None:
    def spoil(engine: Engine) -> None:
        engine.tokenizer.chat_template = engine.tokenizer.chat_template.replace(
            "<|im_start|>assistant\n", "<|im_start|>assistant: the answer is\n"
        )

    lines = told(serve(spoil), folder)
    assert lines and all(", chat: " in line for line in lines)
    assert any("it has another chat template" in line for line in lines)


def test_added_bos_is_told(serve: Served, folder: Path) -> None:
    def spoil(engine: Engine) -> None:
        engine.tokenizer.chat_template = "{{ bos_token }}" + engine.tokenizer.chat_template

    assert any("adds a BOS token of its own" in line for line in told(serve(spoil), folder))


def test_server_that_does_not_stop_is_told(
    serve: Served, copied: Callable[..., Path], folder: Path
) -> None:
    """The export's stop ids are made those that its first answer ends with."""
    other = copied("bf16")
    content = json.loads((other / "qtune.json").read_text())
    golden = content["golden"][0]
    stop = golden["greedy_ids"][2]
    assert stop not in golden["greedy_ids"][:2]
    for name in ("greedy_ids", "greedy_logprobs", "top_ids", "top_logprobs"):
        golden[name] = golden[name][:3]
    content |= {"stop_ids": [stop], "golden": [golden]}
    (other / "qtune.json").write_text(json.dumps(content))
    lines = told(serve(), other)
    assert lines[0].startswith(
        f"golden prompt 1, completion: it does not stop at token 3, {stop} ("
    )
    assert told(serve(lambda engine: setattr(engine, "stops", [stop])), other) == []


def test_server_that_stops_too_early_is_told(serve: Served, folder: Path) -> None:
    golden = json.loads((folder / "qtune.json").read_text())["golden"][0]
    stop = golden["greedy_ids"][1]
    lines = told(serve(lambda engine: setattr(engine, "stops", [stop])), folder)
    assert any("token 2 of the answer is the end of the answer" in line for line in lines)


def test_moved_log_probabilities_are_told(serve: Served, folder: Path) -> None:
    lines = told(serve(lambda engine: setattr(engine, "shift", -0.25)), folder)
    assert len(lines) == 4 and all("differ by 0.2" in line for line in lines)


def test_server_that_takes_text_only_is_asked_with_text(serve: Served, folder: Path) -> None:
    url = serve(lambda engine: setattr(engine, "takes_ids", False))
    report = serve_check(url, folder)
    assert report.differences == [] and len(report.answers) == 4


def test_server_without_chat_is_noted(serve: Served, folder: Path) -> None:
    report = serve_check(serve(lambda engine: setattr(engine, "has_chat", False)), folder)
    assert report.differences == [] and len(report.answers) == 2
    assert report.notes[0].startswith("golden prompt 1: no chat: status 404")


def test_unknown_model_lists_those_there_are(serve: Served, folder: Path) -> None:
    url = serve(lambda engine: engine.names.append("base"))
    with pytest.raises(UserError, match=r"has no model 'tunde'; .*--model: tuned, base"):
        serve_check(url, folder, "tunde")
    with pytest.raises(UserError, match=r"has not just one model; .*: tuned, base"):
        serve_check(url, folder)
    assert serve_check(url, folder, "tuned").differences == []


def test_no_server_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no server answers at http://127.0.0.1:9 \("):
        serve_check("127.0.0.1:9", folder)


@pytest.fixture(scope="module")
def llama_server(exported: Callable[..., Path]) -> Iterator[tuple[str, Path]]:
    """llama.cpp's own server with an exported GGUF file: its address, and the folder."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = exported("gguf-q8_0", form="merged")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.n_ctx, settings.n_parallel, settings.port = 512, 1, free_port()
    settings.verbosity, settings.warmup, settings.cpuparams.n_threads = 0, False, 1
    server = xllamacpp.Server(settings)
    yield server.listening_address, folder
    del server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_server_of_llama_cpp_answers_as_the_file_was_measured(
    llama_server: tuple[str, Path],
) -> None:
    report = serve_check(*llama_server)
    assert report.differences == [] and report.notes == []
    assert len(report.answers) == 4
    assert all(found.change is not None for *_, found in report.answers)


def test_server_of_another_export_is_told(
    llama_server: tuple[str, Path], exported: Callable[..., Path]
) -> None:
    """Merged onto 16 bits, and not the 4-bit model that was trained."""
    assert told(llama_server[0], exported("qtune"))
