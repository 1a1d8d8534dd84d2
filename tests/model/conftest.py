"""Tiny GGUF files and wheels, written from scratch, and the model that they stand for."""

import base64
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

# for helpers beside the tests, which are no package
sys.path.insert(0, str(Path(__file__).parent))

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# "1 2" and "Ġ 1" join digits, so a rule that should keep digits apart is seen to do so.
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġ 1", "1 2", "Ġ Ġ"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


@dataclass
class TinyGGUF:
    """What to write: every field can be changed before `write`."""

    architecture: str = "llama"
    tied: bool = True
    pre: str | None = "smollm"
    kind: str = "Q4_1"
    meta: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def write(self, path: Path) -> PreTrainedModel:
        """The model in float32 whose weights are those in the file, rounded to bf16."""
        model = self._model()
        writer = GGUFWriter(path, self.architecture)
        self._add_meta(writer)
        state = model.state_dict()
        for name, weight in state.items():
            if name == "lm_head.weight" and self.tied:
                continue
            kind = GGMLQuantizationType["F32" if weight.ndim == 1 else self.kind]
            stored = quantize(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(dequantize(stored, kind).copy()).bfloat16())
            if self.architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = 4 if "q_proj" in name else 2
                stored = stored.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(stored.shape)
            writer.add_tensor(self._gguf_name(name), stored, raw_dtype=kind)
        for name, values in self.extra.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model

    def _model(self) -> PreTrainedModel:
        kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.architecture]
        config = kind(tie_word_embeddings=self.tied, dtype="float32", **SIZES)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, weight in model.named_parameters():
            weight.requires_grad_(False)
            if weight.ndim == 1:
                weight.normal_(1, 0.1)
            elif "embed" not in name:
                weight.mul_(5)
        return model

    def _gguf_name(self, name: str) -> str:
        top = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name in top:
            return top[name]
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"

    def _add_meta(self, writer: GGUFWriter) -> None:
        writer.add_block_count(2)
        writer.add_context_length(128)
        writer.add_embedding_length(64)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_key_length(16)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(100000.0)
        writer.add_tokenizer_model("gpt2")
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_chat_template(
            "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        )
        for key, value in self.meta.items():
            writer.add_key_value(key, *value)


@pytest.fixture
def tiny_gguf() -> type[TinyGGUF]:
    return TinyGGUF


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[[], Path]:
    """A maker of model folders that pass the check: two small tensors and a tokenizer file."""
    from safetensors.numpy import save_file

    def make() -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "tokenizer.json").write_text("{}")
        save_file({"a": np.ones(3), "b": np.ones((2, 2))}, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def make_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, bytes]], str]:
    """A maker of the wheel fake-model 1.0, the only thing pip then finds; gives its sha256."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))

    def make(files: dict[str, bytes]) -> str:
        wheel = shelf / "fake_model-1.0-py3-none-any.whl"
        info = "fake_model-1.0.dist-info"
        files = {
            **files,
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = ""
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
                record += f"{name},sha256={digest.rstrip(b'=').decode()},{len(content)}\n"
            archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
        return hashlib.sha256(wheel.read_bytes()).hexdigest()

    return make
