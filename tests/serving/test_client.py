"""The client against a server of the standard library that answers as told."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from qtune.errors import UserError
from qtune.serving.client import RefusedError, Server

Reply = tuple[int, bytes]
# what llama.cpp and vLLM answered, shortened
LLAMA = {
    "text": "-in",
    "finish_reason": "length",
    "logprobs": {"content": [{"id": 29, "logprob": -0.75}, {"id": 254, "logprob": -2.5}]},
}
VLLM = {
    "text": "-in",
    "finish_reason": "stop",
    "logprobs": {"tokens": ["-", "in"], "token_logprobs": [-0.75, -2.5]},
}


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], tuple[Server, list[Any]]]]:
    """Starts a server that always gives one reply; and the requests that it got."""
    running = []

    def start(reply: Reply) -> tuple[Server, list[Any]]:
        got: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                got.append((self.path, self.headers["Authorization"], content))
                self.send_response(reply[0])
                self.end_headers()
                self.wfile.write(reply[1])

            do_GET = do_POST

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return Server(f"http://127.0.0.1:{server.server_port}/v1/"), got

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def body(**choice: Any) -> Reply:
    return 200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7}}).encode()


def test_completion_is_asked_for_greedily(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server, got = serve(body(**LLAMA))
    answer = server.complete("tuned", [1, 2], 3)
    assert (answer.text, answer.ids, answer.log_probabilities) == ("-in", [29, 254], [-0.75, -2.5])
    assert not answer.stopped and answer.prompt_tokens == 7
    path, key, content = got[0]
    sent = json.loads(content)
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert sent["prompt"] == [1, 2] and sent["max_tokens"] == 3
    assert (sent["model"], sent["temperature"]) == ("tuned", 0)


def test_parallel_lists_have_no_ids(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server, got = serve(body(**VLLM))
    answer = server.complete("tuned", "text", 3)
    assert (answer.ids, answer.log_probabilities, answer.stopped) == (None, [-0.75, -2.5], True)
    assert got[0][1] is None


def test_chat_may_come_without_log_probabilities(serve: Any) -> None:
    server, got = serve((200, json.dumps({"choices": [{"message": {"content": None}}]}).encode()))
    tools = [{"type": "function"}]
    answer = server.chat("tuned", [{"role": "user", "content": "a"}], tools, 3)
    assert (answer.text, answer.ids, answer.log_probabilities) == ("", None, None)
    assert answer.prompt_tokens is None
    sent = json.loads(got[0][2])
    assert sent["messages"] == [{"role": "user", "content": "a"}] and sent["tools"] == tools


@pytest.mark.parametrize("status", [400, 404, 422])
def test_refused_request_keeps_the_servers_words(status: int, serve: Any) -> None:
    server, _ = serve((status, b'{"error": "no ids"}'))
    with pytest.raises(RefusedError, match=f"status {status}: .*no ids"):
        server.complete("tuned", [1], 3)
    with pytest.raises(UserError, match="is no OpenAI-compatible server: status"):
        server.models()


def test_error_that_comes_as_an_answer_is_a_refusal(serve: Any) -> None:
    server, _ = serve((200, b'{"error": "overloaded"}'))
    with pytest.raises(RefusedError, match=r"without choices: .*overloaded"):
        server.complete("tuned", [1], 3)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((401, b"who are you"), r"wants a key: set OPENAI_API_KEY \(who are you\)"),
        ((503, b"loading"), "answers with status 503: loading"),
        ((200, b"<html>"), "does not answer with JSON"),
    ],
)
def test_what_the_user_can_mend(reply: Reply, problem: str, serve: Any) -> None:
    server, _ = serve(reply)
    with pytest.raises(UserError, match=problem):
        server.models()


def test_models_are_chosen_by_name(serve: Any) -> None:
    server, _ = serve((200, b'{"data": [{"id": "a"}, {"id": "b"}]}'))
    assert server.models() == ["a", "b"] and server.choose("b") == "b"
    with pytest.raises(UserError, match=r"has no model 'c'; name one of these with --model: a, b"):
        server.choose("c")


def test_address_needs_no_scheme() -> None:
    for url in ("localhost:8000", "localhost:8000/v1/", "http://localhost:8000/"):
        assert Server(url).url == "http://localhost:8000"
    with pytest.raises(UserError, match=r"no server answers at http://127.0.0.1:9 \("):
        Server("127.0.0.1:9").models()
