"""The graph of a Llama-like decoder: token ids, a mask and past keys and values in, logits out.

Inputs, outputs and their names are those that onnxruntime-genai expects, so it serves the folder;
attention is ONNX Runtime's own operator, which rotates queries and keys and keeps their cache.
Everything is computed in float32. Rows are padded on the right, and the mask says how long each is.
Models that compute anything else than Llama does are refused by name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from qtune.errors import UserError
from qtune.export.onnx_graph.graph import MICROSOFT, Graph, Shape
from qtune.export.onnx_graph.linear import dense, linear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# kinds of rotation whose angles do not go by the length of the text
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
PAST, PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class Sizes:
    """The numbers that a decoder's attention is made of."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """Those of a transformers config."""
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, heads, config.num_key_value_heads, size)


def check(config: Any) -> None:
    """Raises UserError for a model that this graph is not that of."""
    if config.model_type not in MODEL_TYPES:
        raise UserError(
            f"it knows {', '.join(MODEL_TYPES)}, and this model is "
            f"{config.model_type}; export qtune or gguf instead"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES or config.hidden_act != "silu":
        raise UserError(
            f"it knows rope_type {', '.join(ROPE_TYPES)} with silu, and this model has {rope} with "
            f"{config.hidden_act}; export qtune or gguf instead"
        )


def add_decoder(graph: Graph, model: PreTrainedModel) -> None:
    """Put the whole model, with the adapters on its layers, into the graph.

    Raises UserError for a layer that it cannot hold.
    """
    Decoder(graph, model).add()


class Decoder:
    """A model on its way into a graph."""

    def __init__(self, graph: Graph, model: PreTrainedModel) -> None:
        self.graph, self.model, self.config = graph, model, model.config
        self.sizes = Sizes.of(model.config)
        self.body = model.get_decoder()

    def add(self) -> None:
        """Add inputs, blocks and outputs."""
        graph, config = self.graph, self.config
        ids = graph.input("input_ids", INT64, ["batch", "sequence"])
        mask = graph.input("attention_mask", INT64, ["batch", "total"])
        made = graph.output("logits", FLOAT, ["batch", "sequence", config.vocab_size])
        lengths = self._lengths(mask)
        x = self._embedded(ids)
        tables = self._rotation()
        for number in range(self.sizes.layers):
            x = self._block(x, number, lengths, tables)
        x = self._norm(x, "model.norm", self.body.norm)
        graph.op("Identity", [self._logits(x)], made)

    def _lengths(self, mask: str) -> list[str]:
        """What attention asks of the mask: the last place of each row, and the width of all."""
        graph = self.graph
        axis = graph.constant("lengths.axis", [1])
        one = graph.constant("lengths.one", [1])
        counted = graph.op("ReduceSum", [mask, axis], "lengths/sum", keepdims=0)
        last = graph.op("Sub", [counted, one], "lengths/last")
        shape = graph.op("Shape", [mask], "lengths/shape", start=1, end=2)
        width = graph.op("Squeeze", [shape], "lengths/width")
        return [
            graph.op("Cast", [name], f"{name}32", to=TensorProto.INT32) for name in (last, width)
        ]

    def _embedded(self, ids: str) -> str:
        table = _active(self.model.get_input_embeddings()).get_parameter("weight")
        stored = self.graph.weight("model.embed_tokens.weight", table)
        rows = self.graph.op("Gather", [stored, ids], "model.embed_tokens/rows")
        return self.graph.op("Cast", [rows], "model.embed_tokens/embedded", to=FLOAT)

    def _logits(self, x: str) -> str:
        head: Any = self.model.get_output_embeddings()
        if not isinstance(head, LoraLayer):
            head, table = _active(head), _active(self.model.get_input_embeddings())
            weight = table.get_parameter("weight")
            if getattr(head, "weight", None) is weight:
                # tied: the graph has it once
                return dense(self.graph, x, "model.embed_tokens", weight)
        return linear(self.graph, x, "lm_head", head)

    def _rotation(self) -> list[str]:
        """Cosines and sines [P, D/2] of all positions that the model has."""
        device = self.model.device
        positions = torch.arange(self.config.max_position_embeddings, device=device)
        dtype_of = torch.zeros(1, device=device)
        tables = self.body.rotary_emb(dtype_of, positions.unsqueeze(0))
        half = self.sizes.head_size // 2
        names = ("rotation.cos", "rotation.sin")
        return [
            self.graph.weight(name, table[0, :, :half].float())
            for name, table in zip(names, tables, strict=True)
        ]

    def _block(self, x: str, number: int, lengths: list[str], tables: list[str]) -> str:
        block, name = self.body.layers[number], f"model.layers.{number}"
        inner = self._norm(x, f"{name}.input_layernorm", block.input_layernorm)
        attended = self._attention(inner, number, block.self_attn, lengths, tables)
        x = self.graph.op("Add", [x, attended], f"{name}/attended")
        norm = f"{name}.post_attention_layernorm"
        inner = self._norm(x, norm, block.post_attention_layernorm)
        fed = self._mlp(inner, f"{name}.mlp", block.mlp)
        return self.graph.op("Add", [x, fed], f"{name}/fed")

    def _attention(
        self, x: str, number: int, attention: Any, lengths: list[str], tables: list[str]
    ) -> str:
        graph, sizes = self.graph, self.sizes
        name = f"model.layers.{number}.self_attn"
        made = {}
        for part in "qkv":
            projection = getattr(attention, f"{part}_proj")
            made[part] = linear(graph, x, f"{name}.{part}_proj", projection)
            norm = getattr(attention, f"{part}_norm", None)
            if norm is not None:
                made[part] = self._norm_of_heads(made[part], f"{name}.{part}_norm", norm)
        cache: Shape = ["batch", sizes.kv_heads, "past", sizes.head_size]
        past = [graph.input(f"{PAST}.{number}.{p}", FLOAT, cache) for p in ("key", "value")]
        grown: Shape = ["batch", sizes.kv_heads, "total", sizes.head_size]
        present = [graph.output(f"{PRESENT}.{number}.{p}", FLOAT, grown) for p in ("key", "value")]
        y, *_ = graph.ops(
            "GroupQueryAttention",
            [*made.values(), *past, *lengths, *tables],
            [f"{name}/attention", *present],
            domain=MICROSOFT,
            num_heads=sizes.heads,
            kv_num_heads=sizes.kv_heads,
            scale=float(attention.scaling),
            do_rotary=1,
            local_window_size=self._window(number),
        )
        return linear(graph, y, f"{name}.o_proj", attention.o_proj)

    def _window(self, number: int) -> int:
        """How many tokens a block looks back on, its own counted; -1: all."""
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        slides = kinds is None or kinds[number] == "sliding_attention"
        return int(window) if window and slides else -1

    def _mlp(self, x: str, name: str, mlp: Any) -> str:
        graph = self.graph
        gate, up = (
            linear(graph, x, f"{name}.{part}", getattr(mlp, part))
            for part in ("gate_proj", "up_proj")
        )
        share = graph.op("Sigmoid", [gate], f"{name}/sigmoid")
        silu = graph.op("Mul", [gate, share], f"{name}/silu")
        gated = graph.op("Mul", [silu, up], f"{name}/gated")
        return linear(graph, gated, f"{name}.down_proj", mlp.down_proj)

    def _norm_of_heads(self, x: str, name: str, norm: nn.Module) -> str:
        """Each head of x [B, T, N D] normed by itself."""
        heads = self.graph.constant("heads.split", [0, 0, -1, self.sizes.head_size])
        joined = self.graph.constant("heads.joined", [0, 0, -1])
        split = self.graph.op("Reshape", [x, heads], f"{name}/split")
        normed = self._norm(split, name, norm)
        return self.graph.op("Reshape", [normed, joined], f"{name}/joined")

    def _norm(self, x: str, name: str, norm: nn.Module) -> str:
        norm = _active(norm)
        weight = self.graph.weight(f"{name}.weight", norm.get_parameter("weight").float())
        epsilon: Any = getattr(norm, "variance_epsilon", None)
        return self.graph.op(
            "SimplifiedLayerNormalization",
            [x, weight],
            f"{name}/normed",
            axis=-1,
            epsilon=float(epsilon if epsilon is not None else self.config.rms_norm_eps),
            stash_type=FLOAT,
        )


def _active(module: Any) -> nn.Module:
    """The module itself, or the trained one in its place; UserError: an adapter is on it."""
    if isinstance(module, LoraLayer):
        raise UserError(
            "export onnx: an adapter on embeddings has no nodes; name them in lora.modules_to_save"
        )
    if isinstance(module, ModulesToSaveWrapper):
        (adapter,) = module.active_adapters
        found: nn.Module = module.modules_to_save[adapter]
        return found
    assert isinstance(module, nn.Module)
    return module
