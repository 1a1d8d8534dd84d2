"""The chat template that goes with trained weights: its text, and its hash in qtune.json.

Under another template the weights answer as nobody trained them to, and nothing shows it. So the
hash is kept beside the adapter, and what talks to a run compares it first.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qtune.data.template import template_date, template_hash
from qtune.errors import UserError
from qtune.model.folder import read_json

NAME = "qtune.json"
_TEXT = "chat_template.jinja"
_SHOWN = 16


def write_text(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the template as transformers looks for it; nothing where the tokenizer has none."""
    if isinstance(tokenizer.chat_template, str):
        # line ends stay as they are: they are part of the hash
        (folder / _TEXT).write_bytes(tokenizer.chat_template.encode())


def facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What qtune.json says of the template: its hash, and the date it was given; null for none."""
    has_one = bool(tokenizer.chat_template)
    return {
        "template_sha256": template_hash(tokenizer) if has_one else None,
        "template_date": template_date(tokenizer) if has_one else None,
    }


def check(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless the tokenizer has the template that the adapter was trained with.

    Adapters written without a hash pass: there is nothing to compare.
    """
    path = adapter / NAME
    if not path.is_file():
        return
    trained, now = read_json(path).get("template_sha256"), facts(tokenizer)["template_sha256"]
    if trained is not None and trained != now:
        raise UserError(
            f"the chat template has changed since {adapter} was trained: its hash was "
            f"{trained[:_SHOWN]} and is {now[:_SHOWN] if now else 'none'}; put the old template "
            f"back, or set data.template in {adapter.parent / 'recipe.yaml'} to "
            f"{adapter / _TEXT}, which is the old one"
        )
