"""What an exported folder holds, in a few kilobytes: enough to say later what differs, not only
that something does.

Every file has its SHA-256. A changed weight file is told apart by a checksum for each module, a
configuration by its values. Of the tokenizer the added tokens are kept, and of all tokens two sums
of hashes, the second weighted by id: if a single token changes, the quotient of what both sums
change by is its id.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export.folder import template
from qtune.model.folder import read_json

# people edit a card, and qtune.json cannot hold its own hash
NOT_HASHED = (template.NAME, "README.md")
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")
# told in other places, and long
_NOT_KEPT = ("added_tokens_decoder", "chat_template")
_CHUNK = 1 << 22


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file, by its path in the folder; hidden ones are left out."""
    found = {}
    for name, path in sorted(visible(folder)):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"bytes": path.stat().st_size, "sha256": sha256}
    return found


def visible(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that are hashed: path in the folder, with slashes, and where it is."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() not in NOT_HASHED:
            yield name.as_posix(), path


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The values of each configuration file, by its path in the folder."""
    return {name: config(path) for name, path in sorted(visible(folder)) if path.name in CONFIGS}


def config(path: Path) -> dict[str, Any]:
    """The values of a configuration file without those that are kept elsewhere."""
    return {key: value for key, value in read_json(path).items() if key not in _NOT_KEPT}


def modules(folder: Path) -> dict[str, str]:
    """A checksum of each module's tensors in the safetensors files, by the module's name.

    Raises UserError for a file that is cut off or damaged.
    """
    digests: dict[str, Any] = {}
    for name, path in sorted(visible(folder)):
        if path.suffix == ".safetensors":
            inner = f"{Path(name).parent.as_posix()}/" if "/" in name else ""
            for tensor, digest in _tensors(path):
                module = inner + _module(tensor)
                digests.setdefault(module, hashlib.blake2b(digest_size=4)).update(digest)
    return {name: found.hexdigest() for name, found in sorted(digests.items())}


def tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What is kept of a tokenizer's vocabulary: its size, the added tokens by id, and two sums."""
    vocabulary = tokenizer.get_vocab()
    hashes = [(index, _number(text)) for text, index in vocabulary.items()]
    added = {str(index): str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    return {
        "size": len(vocabulary),
        "added": added,
        # too long for the numbers of some JSON readers
        "sums": [hex(sum(h for _, h in hashes)), hex(sum(i * h for i, h in hashes))],
    }


def changed_token(was: dict[str, Any], now: dict[str, Any]) -> int | None:
    """The id of the only token that differs between two results of `tokens`; None: there are
    several, or none.
    """
    plain, weighted = (
        int(b, 16) - int(a, 16) for a, b in zip(was["sums"], now["sums"], strict=True)
    )
    if plain == 0 or weighted % plain or not 0 <= weighted // plain < max(was["size"], now["size"]):
        return None
    return weighted // plain


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _module(tensor: str) -> str:
    """The module of a tensor, also where a format has several for one weight."""
    before, found, _ = tensor.partition(".weight")
    return before if found else tensor.rpartition(".")[0] or tensor


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and hash of each tensor of a safetensors file, with its dtype and shape, by name."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is damaged ({error}); copy or download it again") from error
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            first, end = entry["data_offsets"]
            digest = hashlib.blake2b(f"{name} {entry['dtype']} {entry['shape']}".encode())
            file.seek(start + first)
            left = end - first
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
            if left:
                raise UserError(f"{path} is cut off in {name}; copy or download it again")
            yield name, digest.digest()
