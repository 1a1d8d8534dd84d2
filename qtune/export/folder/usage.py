"""How an exported folder is used: the code and the commands of its card.

Only consumers that really load the form are named. In all of them `.` is the folder itself, so that
they run inside it as they are; `qtune push` puts the name on the hub in its place.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtune.model.folder import read_json

HERE = "."
Manifest = dict[str, Any]
# ranks that vLLM makes room for
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_ASK = """
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
"""
_ASK_TEXT = '\ninputs = tokenizer(text, return_tensors="pt").to(model.device)\n'
_ANSWER = """output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
_GENAI = """{imports}import onnxruntime_genai

model = onnxruntime_genai.Model("{here}")
tokenizer = onnxruntime_genai.Tokenizer(model)
{asked}
prompt = {prompt}
settings = onnxruntime_genai.GeneratorParams(model)
settings.set_search_options(max_length=512, do_sample=False)
generator = onnxruntime_genai.Generator(model, settings)
generator.append_tokens(tokenizer.encode(prompt))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
_GENAI_CHAT = "tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)"
# exports of 8-bit weights alone
_GPU_ONLY = ("gptq-int8", "compressed-tensors-w8a16")
# characters of a golden prompt that is shown
_LONGEST = 1000
# what transformers needs beside itself, by the first word of an export's name
_NEEDS = {
    "adapter": "peft",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel optimum",
    "awq": "gptqmodel optimum",
    "compressed": "compressed-tensors",
    "qtune": "qtune",
}


def usage(folder: Path, manifest: Manifest) -> str:
    """Markdown with the code and commands for each consumer of the export in `folder`."""
    kind = str(manifest["export"]).split("-")[0]
    parts = _PARTS.get(manifest["export"]) or _PARTS[kind]
    return "\n\n".join(part(folder, manifest) for part in parts)


def adapter_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the adapter that an export is, or has beside it; None: it has none."""
    paths = (folder / "adapter_config.json", folder / "adapter" / "adapter_config.json")
    return next((read_json(path) for path in paths if path.is_file()), None)


def _transformers(folder: Path, manifest: Manifest) -> str:
    """Code for transformers, with PEFT where there is an adapter."""
    kind, config = str(manifest["export"]).split("-")[0], adapter_config(folder)
    on_base = manifest["form"] == "adapter" and config is not None
    name = json.dumps(config["base_model_name_or_path"]) if on_base and config else f'"{HERE}"'
    lines = ["import qtune"] if kind == "qtune" else []
    lines += ["from peft import PeftModel"] if config else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
        f'model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto", device_map="auto")',
    ]
    if config:
        inner = "" if on_base else ', subfolder="adapter"'
        lines.append(f'model = PeftModel.from_pretrained(model, "{HERE}"{inner})')
    code = "\n".join([*lines, *_request(manifest)]) + _ANSWER
    needs = " ".join(dict.fromkeys(["transformers", "accelerate", _NEEDS.get(kind, "")])).strip()
    needs += " peft" if config and "peft" not in needs else ""
    return f"### transformers\n\n```sh\npip install {needs}\n```\n\n```python\n{code}```"


def _request(manifest: Manifest) -> list[str]:
    """Lines that make transformers' inputs."""
    asks = _ASK_TEXT if manifest["template_sha256"] is None else _ASK
    return [_asked(manifest), asks.strip("\n"), ""]


def _asked(manifest: Manifest) -> str:
    """The line with the request: a golden prompt, or any question where that is long."""
    golden = next(iter(manifest["golden"]), None)
    if manifest["template_sha256"] is None:
        text = golden["text"] if golden and golden["text"] else "Once upon a time"
        return f"text = {text!r}"
    messages = golden["messages"] if golden and not golden["tools"] else None
    if not messages or len(json.dumps(messages)) > _LONGEST:
        messages = [{"role": "user", "content": "What can you do?"}]
    listed = "".join(f"    {message!r},\n" for message in messages)
    return f"messages = [\n{listed}]"


def _vllm(folder: Path, manifest: Manifest) -> str:
    """The command for vLLM, with its LoRA options where there is an adapter."""
    if manifest.get("vllm"):
        return f"### vLLM\n\nIt does not load this adapter: {'; '.join(manifest['vllm'])}."
    config, place = adapter_config(folder), HERE
    # scales of codes are float16 numbers, and small updates vanish beside bfloat16 outputs
    dtype = " --dtype float16" if manifest["form"] == "pair" else ""
    command = f"vllm serve {place}{dtype}"
    if config:
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
        room = next((known for known in _VLLM_RANKS if known >= rank), _VLLM_RANKS[-1])
        where = f"{HERE}/adapter"
        if manifest["form"] == "adapter":
            place, where = config["base_model_name_or_path"], HERE
        lora = f"--enable-lora --max-lora-rank {room} --lora-modules tuned={where}"
        command = f"vllm serve {place}{dtype} {lora}"
    note = "\n\nAsk for the model `tuned`; under the other name the base answers." if config else ""
    if manifest["export"] in _GPU_ONLY:
        note += "\n\nvLLM has kernels of this form for GPUs alone."
    return f"### vLLM\n\n```sh\n{command}\n```{note}{_served(8000, 'tuned' if config else None)}"


def _llamacpp(folder: Path, manifest: Manifest) -> str:
    """The command for llama.cpp's server."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))
    lora = [name for name in files if name.rpartition("/")[2].startswith("adapter")]
    # an adapter alone goes onto a file that the user has
    model = next((name for name in files if name not in lora), "BASE.gguf")
    options = f" --lora {lora[0]}" if lora else ""
    note = "\n\n`BASE.gguf` is the base as GGUF file in 16 bits or Q8_0."
    command = f"llama-server -m {model}{options} --jinja --port 8080"
    shown = note if model == "BASE.gguf" else ""
    return f"### llama.cpp\n\n```sh\n{command}\n```{shown}{_served(8080, None)}"


def _onnxruntime(folder: Path, manifest: Manifest) -> str:
    """Code for onnxruntime-genai, which generates with ONNX Runtime."""
    chat = manifest["template_sha256"] is not None
    code = _GENAI.format(
        here=HERE, asked=_asked(manifest), imports="import json\n\n" if chat else "",
        prompt=_GENAI_CHAT if chat else "text",
    )  # fmt: skip
    return (
        "### ONNX Runtime\n\n```sh\npip install onnxruntime onnxruntime-genai\n```\n\n"
        f"```python\n{code}```"
    )


def _served(port: int, model: str | None) -> str:
    """The command that checks a server."""
    name = f" --model {model}" if model else ""
    return (
        "\n\nWhether it then answers as it should, and with this chat template:\n\n"
        f"```sh\nqtune serve-check http://localhost:{port} {HERE}{name}\n```"
    )


Part = Callable[[Path, Manifest], str]
_BOTH: tuple[Part, ...] = (_transformers, _vllm)
_PARTS: dict[str, tuple[Part, ...]] = {
    "adapter": _BOTH,
    "adapter-gguf": (_llamacpp,),
    "bf16": _BOTH,
    "fp16": _BOTH,
    "bitsandbytes": (_transformers,),
    "gptq": _BOTH,
    "awq": _BOTH,
    "compressed": _BOTH,
    "gguf": (_llamacpp,),
    "onnx": (_onnxruntime,),
    "qtune": (_transformers,),
}
