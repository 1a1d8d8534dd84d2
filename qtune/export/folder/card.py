"""README.md, the model card of an export: written anew from qtune.json whenever that learns more.

What the hub reads is in its front matter. The licence is that of the base, as the base's own card
says it; where there is only a licence file, the card points to it, and nothing is made up.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from qtune.export.folder import template
from qtune.export.folder.card_table import results
from qtune.export.folder.usage import HERE, adapter_config, usage
from qtune.model import sources
from qtune.model.folder import read_json

NAME = "README.md"
BASE_CARD = "README.base.md"
Manifest = dict[str, Any]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COPIED = ("license", "license_name", "license_link", "language")
_QUANTIZED = ("bitsandbytes", "gptq", "awq", "compressed", "gguf", "onnx", "qtune")
_TAG = {kind: kind for kind in _QUANTIZED} | {"compressed": "compressed-tensors"}
_LIBRARY = {"gguf": "llama.cpp", "onnx": "onnxruntime", "qtune": "qtune"}


def write(folder: Path) -> None:
    """Write the card of the export in `folder` from its qtune.json."""
    manifest = read_json(folder / template.NAME)
    front = yaml.safe_dump(metadata(folder, manifest), sort_keys=False, allow_unicode=True)
    parts = (
        _title(manifest),
        results(manifest),
        f"## How to use it\n\nWhere it says `{HERE}`, run it in this folder.",
        usage(folder, manifest),
        _prompts(manifest),
        _made(folder, manifest),
    )
    text = f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def metadata(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What the hub reads of the card; entries that are not known are left out."""
    kind = str(manifest["export"]).split("-")[0]
    found = _license(folder)
    base = hub_name(manifest["base"]["model"])
    if base is not None:
        relation = "quantized" if kind in _QUANTIZED else "finetune"
        found["base_model"] = base
        found["base_model_relation"] = "adapter" if kind == "adapter" else relation
    usual = "peft" if kind == "adapter" else "transformers"
    found["library_name"] = _LIBRARY.get(kind, usual)
    found["pipeline_tag"] = "text-generation"
    has_lora = adapter_config(folder) is not None
    chat = manifest["template_sha256"] is not None
    tags = ["qtune", has_lora and "lora", _TAG.get(kind), chat and "conversational"]
    found["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return found


def hub_name(model: str) -> str | None:
    """The base's id on the hub, where the recipe names one or a file that is a copy of one."""
    mirrored = {str(file): name for name, file in sources.MIRRORS.items()}
    if model in mirrored:
        return mirrored[model]
    return model if _HUB_ID.fullmatch(model) and not Path(model).exists() else None


def _license(folder: Path) -> dict[str, Any]:
    """The base's licence and languages, from its card or, for want of that, its licence file."""
    front = front_matter(folder / BASE_CARD)
    found = {key: front[key] for key in _COPIED if key in front}
    files = sorted(path.name for path in folder.glob("LICEN[CS]E*"))
    if "license" not in found and files:
        found |= {"license": "other", "license_name": "as-the-base", "license_link": files[0]}
    return found


def front_matter(path: Path) -> dict[str, Any]:
    """The values at the head of a card; empty where there is no card, or nothing to be read."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        value = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        # a base's card that nobody can read says nothing
        return {}
    return value if isinstance(value, dict) else {}


def _title(manifest: Manifest) -> str:
    base = str(manifest["base"]["model"])
    name = hub_name(base)
    shown = f"[{name}](https://huggingface.co/{name})" if name else f"`{Path(base).name}`"
    what = {
        "adapter": "A LoRA adapter",
        "pair": "The quantized base with the adapter beside it",
        "merged": "One model, the adapter merged in",
    }[manifest["form"]]
    exact = (
        "It is the very model that was trained and measured."
        if manifest["exact"]
        else "It is not bit for bit the model that was trained; the table says what that costs."
    )
    return (
        f"# {(name or base).rpartition('/')[2]}, tuned ({manifest['export']})\n\n"
        f"{what}, tuned from {shown} with qtune. {exact}"
    )


def _prompts(manifest: Manifest) -> str:
    """What a server has to get right: the template, and where answers end."""
    stops = " or ".join(str(stop) for stop in manifest["stop_ids"])
    if manifest["template_sha256"] is None:
        text = "The model continues plain text; it has no chat template."
    else:
        text = (
            "The model answers as it was trained to under the chat template in this folder only "
            f"(`chat_template.jinja`, SHA-256 `{manifest['template_sha256'][:16]}...`)."
        )
    golden = len(manifest["golden"])
    asked = f" It holds {golden} of the held-out requests with the answers." if golden else ""
    return (
        f"## Prompts and stop tokens\n\n{text} Answers end with token {stops}.\n\n"
        f"`qtune verify {HERE}` checks a copy of this folder against `qtune.json`.{asked}"
    )


def _made(folder: Path, manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in manifest["versions"].items() if found)
    legal = " Its card is README.base.md." if (folder / BASE_CARD).is_file() else ""
    base = manifest["base"]
    return (
        f"## How it was made\n\nWith {versions}. The base's weights have the SHA-256 "
        f"`{base['sha256'][:16]}...` (of {base['of']}).{legal} The recipe:\n\n"
        f"```yaml\n{manifest['recipe']}```"
    )
