"""What tokenised samples depend on, as one key: with the same key, the same samples.

The key covers the rows (`sources.fingerprint`), the tokenizer, the chat template, the options of
the recipe that change samples, and the code that makes them: every file of this package, so that
nobody has to remember to count a version up, and the libraries that render and tokenise. Learning
rates, the weights of a mix and the seed are not in it: changing them tokenises nothing again.
"""

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qtune.data.sources import fingerprint
from qtune.data.tokens import check_fast
from qtune.recipe_data import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LIBRARIES = ("jinja2", "tokenizers", "transformers")
# what a tokenizer's own file says of padding and cutting is changed by using it
CHANGED_BY_USE = ("padding", "truncation")


def samples_key(source: Source, tokenizer: "Tokenizer", settings: Data) -> str:
    """SHA-256, in hex, of everything that the samples of a source are made from.

    Raises UserError where the source cannot be read.
    """
    facts = {
        "rows": fingerprint(source),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": tokenizer.chat_template,
        "max_length": settings.max_length,
        "overlong": settings.overlong,
        "train_on": settings.train_on,
        "code": code_hash(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: "Tokenizer") -> str:
    """SHA-256 of what turns text into ids, in hex: vocabulary, rules and special tokens.

    Raises UserError for a slow tokenizer.
    """
    check_fast(tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for key in CHANGED_BY_USE:
        rules.pop(key, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([rules, special], sort_keys=True).encode()).hexdigest()


@cache
def code_hash(folder: Path = Path(__file__).parent) -> str:
    """SHA-256 of the Python files in a folder and below it, in hex."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
