"""What vLLM says no to in a PEFT folder, from the folder's configuration alone.

vLLM serves adapters at run time and takes fewer kinds than PEFT does. Its rules are those of its
version 0.32 (`vllm/lora/peft_helper.py` and `vllm/config/lora.py`); what is no problem there is
served exactly as PEFT applies it.
"""

from pathlib import Path
from typing import Any

from qtune.model.folder import read_json

LARGEST_RANK = 512
# named starts that leave the base as it is; what others do to it, vLLM cannot know
STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
# the only layers beside an adapter that vLLM knows
SAVED = ("classifier", "score")


def problems(config: dict[str, Any]) -> list[str]:
    """Why vLLM does not load an adapter of this adapter_config.json; empty: it does."""
    rank, saved = _rank(config), sorted(set(config.get("modules_to_save") or ()) - set(SAVED))
    start = config.get("init_lora_weights", True)
    changes = isinstance(start, str) and start.lower() not in STARTS
    reasons = [
        (rank > LARGEST_RANK, f"rank {rank} is above {LARGEST_RANK}; merge it"),
        (config.get("bias", "none") != "none", "it has trained biases; merge it"),
        (bool(config.get("lora_bias")), "it has biases of its own; merge it"),
        (bool(config.get("use_dora")), "it has lengths of DoRA; merge it"),
        (bool(saved), f"it has whole layers ({', '.join(saved)}); merge it"),
        (changes, f"its start, {start}, changed the base; merge it"),
        (bool(config.get("use_qalora")), "QA-LoRA pools inputs; export the quantized model"),
        (bool(config.get("use_bdlora")), "its matrices are made of blocks (BD-LoRA); merge it"),
        (bool(config.get("layer_replication")), "it repeats layers of the base; merge it"),
        (bool(config.get("trainable_token_indices")), "it has trained tokens; merge it"),
        (bool(config.get("alora_invocation_tokens")), "it waits for tokens (aLoRA); merge it"),
    ]
    return [text for is_so, text in reasons if is_so]


def notes(folder: Path) -> dict[str, Any]:
    """What qtune.json says of vLLM and the adapter that `folder` is or has; nothing without one."""
    paths = (folder / "adapter_config.json", folder / "adapter" / "adapter_config.json")
    return next(({"vllm": problems(read_json(path))} for path in paths if path.is_file()), {})


def _rank(config: dict[str, Any]) -> int:
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)
