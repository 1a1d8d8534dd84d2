"""Models from the Hugging Face hub, or a quick decision that there is no hub.

huggingface_hub retries for minutes without a network. One probe with a limit of three seconds, name
look-up included, goes first. Only safetensors, text and tokenizer files are fetched, never pickles;
a model's own Python files come along as text and run only with `trust_remote_code`.
"""

import http.client
import os
import queue
import threading
import urllib.error
import urllib.request
from pathlib import Path

from qtune.errors import UserError
from qtune.model.folder import check_folder

PROBE_SECONDS = 3.0
_WEIGHTS = ["*.safetensors"]
_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
# Other layouts of the same weights (original/, onnx/, Mistral's consolidated file).
_UNWANTED = ["*/*", "consolidated*"]


class HubError(Exception):
    """The hub gave no model; the message says why, for a caller that may know another place."""


def endpoint() -> str:
    """Address of the hub: `HF_ENDPOINT`, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def cached_snapshot(repo: str, revision: str | None, *, weights: bool = True) -> Path | None:
    """Folder of a complete snapshot that was downloaded before, or None."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=_patterns(weights),
            ignore_patterns=_UNWANTED,
        )
        check_folder(Path(found), weights=weights)
    except (OSError, UserError):
        # Nothing there, or a download that was broken off: the download will complete it.
        return None
    return Path(found)


def download_snapshot(repo: str, revision: str | None, *, weights: bool = True) -> Path:
    """Folder of the downloaded snapshot, its weights left out where they are not wanted.

    HubError: no hub within seconds, or it refused. UserError: the model has no safetensors.
    """
    import huggingface_hub

    # The HTTP library below the hub's client changed its name; this one is there in every version.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    problem = probe()
    if problem is not None:
        raise HubError(problem)
    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            endpoint=endpoint(),
            allow_patterns=_patterns(weights),
            ignore_patterns=_UNWANTED,
        )
    except (OSError, HTTPError) as error:
        raise HubError(f"{endpoint()} gave no {repo}: {_first_line(error)}") from error
    if weights and not any(Path(found).glob("*.safetensors")):
        raise UserError(
            f"{repo} has no safetensors on the hub; pickled weights (.bin, .pt) can run code when "
            "opened and are never downloaded. Convert them once where you trust them "
            "(from_pretrained, then save_pretrained) and name that folder"
        )
    return Path(found)


def probe() -> str | None:
    """None when the hub answers; otherwise why it is not asked. Takes `PROBE_SECONDS` at most."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    answers: queue.Queue[str | None] = queue.Queue()
    address = endpoint()
    # A thread, because a socket timeout does not cover the look-up of the name.
    threading.Thread(target=lambda: answers.put(_ask(address)), daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return f"{address} did not answer within {PROBE_SECONDS:.0f} s"


def _patterns(weights: bool) -> list[str]:
    return _WANTED + _WEIGHTS if weights else _WANTED


def _ask(address: str) -> str | None:
    try:
        request = urllib.request.Request(f"{address}/api/models?limit=1", method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        # A refusal of this address need not hold for the model; a broken server would be retried
        # long.
        return f"{address} answers with status {error.code}" if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{address} cannot be reached ({getattr(error, 'reason', error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
