"""What is asked of an OpenAI-compatible server, with the standard library alone.

Servers agree on the requests and differ in the answers: log-probabilities come as a list of tokens
(llama.cpp, and chats everywhere) or as parallel lists (vLLM's completions), token ids or none, and
not all take a prompt as token ids. A key, where one is asked for, is OPENAI_API_KEY.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from qtune.data.rows import Message
from qtune.errors import UserError

# the first request may wait for a model to be loaded
TIMEOUT_S = 600.0
_REFUSED = (400, 404, 405, 415, 422, 500, 501)


class RefusedError(Exception):
    """The server answers, but not this request; the message is its own."""


@dataclass(frozen=True)
class Answer:
    """What a server answered: text, and of each token its id and log-probability where it tells.

    `stopped` says that it ended by itself, `prompt_tokens` how long the prompt was to the server.
    """

    text: str
    ids: list[int] | None
    log_probabilities: list[float] | None
    stopped: bool
    prompt_tokens: int | None


class Server:
    """An OpenAI-compatible server; `url` is its address, with or without /v1."""

    def __init__(self, url: str) -> None:
        root = url.rstrip("/").removesuffix("/v1")
        self.url = root if "://" in root else f"http://{root}"

    def models(self) -> list[str]:
        """The names of its models. UserError: there is no such server."""
        try:
            listed = self._ask("/v1/models")
        except RefusedError as error:
            raise UserError(f"{self.url} is no OpenAI-compatible server: {error}") from error
        return [str(model["id"]) for model in listed.get("data", [])]

    def choose(self, model: str | None) -> str:
        """The model's name, or that of the only one. UserError lists the names if that fails."""
        known = self.models()
        if model in known:
            return str(model)
        if model is None and len(known) == 1:
            return known[0]
        names = ", ".join(known) or "none"
        problem = f"has no model {model!r}" if model else "has not just one model"
        raise UserError(f"{self.url} {problem}; name one of these with --model: {names}")

    def complete(self, model: str, prompt: list[int] | str, max_tokens: int) -> Answer:
        """The greedy continuation of a prompt. Raises RefusedError for what it does not take."""
        found = self._ask("/v1/completions", _greedy(model, max_tokens, prompt=prompt, logprobs=1))
        choice = _choice(found)
        return _answer(found, choice, choice.get("text") or "")

    def chat(
        self, model: str, messages: list[Message], tools: list[Any] | None, max_tokens: int
    ) -> Answer:
        """The greedy answer to messages. Raises RefusedError for what it does not take."""
        body = _greedy(model, max_tokens, messages=messages, logprobs=True, top_logprobs=1)
        found = self._ask("/v1/chat/completions", body | ({"tools": tools} if tools else {}))
        choice = _choice(found)
        return _answer(found, choice, choice.get("message", {}).get("content") or "")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except urllib.error.HTTPError as error:
            raise _refusal(error, self.url + path) from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise UserError(
                f"no server answers at {self.url} ({why}); start one, as README.md of the export "
                "says, and give its address"
            ) from error
        except ValueError as error:
            raise UserError(f"{self.url}{path} does not answer with JSON: {error}") from error


def _greedy(model: str, max_tokens: int, **request: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": max_tokens, "temperature": 0, "seed": 0, **request}


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    """What an HTTP error becomes; the server's own words are kept, whatever their form."""
    with error:
        words = error.read().decode(errors="replace").strip()[:300]
    if error.code in (401, 403):
        return UserError(f"{url} wants a key: set OPENAI_API_KEY ({words})")
    if error.code in _REFUSED:
        return RefusedError(f"status {error.code}: {words}")
    return UserError(f"{url} answers with status {error.code}: {words}")


def _choice(found: dict[str, Any]) -> dict[str, Any]:
    """The one answer of a response. Raises RefusedError for a response without."""
    choices = found.get("choices")
    if not choices:
        raise RefusedError(f"an answer without choices: {json.dumps(found)[:300]}")
    chosen: dict[str, Any] = choices[0]
    return chosen


def _answer(found: dict[str, Any], choice: dict[str, Any], text: str) -> Answer:
    ids, values = _tokens(choice.get("logprobs") or {})
    return Answer(
        text=text,
        ids=ids,
        log_probabilities=values,
        stopped=choice.get("finish_reason") == "stop",
        prompt_tokens=(found.get("usage") or {}).get("prompt_tokens"),
    )


def _tokens(logprobs: dict[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    """Token ids and log-probabilities in either form; None for what is not told."""
    content = logprobs.get("content")
    if content is None:
        return None, logprobs.get("token_logprobs")
    ids = [token["id"] for token in content if "id" in token]
    return ids if len(ids) == len(content) else None, [token["logprob"] for token in content]
