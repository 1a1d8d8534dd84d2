"""The ways to train an adapter that the step table compares, on one folder of random weights.

All keep norms, embeddings and head in bf16 and take the same batch. PEFT's own layers run under
bf16 autocast, as Trainer runs them; preparing the model as PEFT documents would cast the head to
float32 and only slow them down. unsloth's calls (unsloth_calls.py) are put into the same model;
around them are qtune's own norms, gates, rotations and loss, so that what is compared is how the
products are made. unsloth itself is not installed on the machine: it asks for older transformers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from gpu import unsloth_calls
from gpu.unsloth_calls import Matrix
from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.sample import Sample
from qtune.model.load import add_adapter, load_base
from qtune.recipe import Lora, Quant, Train
from qtune.train import recompute
from qtune.train.objective import load_objective
from qtune_kernels.cross_entropy import linear_cross_entropy
from qtune_kernels.norm import rms_norm
from qtune_kernels.rope import rope

LORA = Lora()

MeanLoss = Callable[[], Tensor]
Peer = Callable[[Path, Tensor, recompute.Policy], tuple[nn.Module, MeanLoss]]


def qtune(folder: Path, ids: Tensor, policy: recompute.Policy) -> tuple[nn.Module, MeanLoss]:
    """The model as `qtune train` makes it, and the loss of its loop."""
    model = add_adapter(load_base(folder, Quant(format="nf4"), device=ids.device), LORA)
    recompute.use(model.get_base_model(), policy)
    rows = enumerate(ids.tolist())
    samples = [Sample(f"random:{i}", row, [0.0] + [1.0] * (len(row) - 1)) for i, row in rows]
    batch = collate(samples, ids.device, multiple=ROW_MULTIPLE)
    objective = load_objective(Train(steps=1))
    num_targets = objective.count(samples)

    def mean_loss() -> Tensor:
        total, _ = objective.loss(model, batch, None)
        return total / num_targets

    return model, mean_loss


def peft(folder: Path, ids: Tensor, policy: recompute.Policy) -> tuple[nn.Module, MeanLoss]:
    """transformers, PEFT and bitsandbytes, with the loss that transformers makes of labels."""
    model = _peft_model(folder, ids.device)
    recompute.use(model.get_base_model(), policy)
    on_gpu = ids.device.type == "cuda"

    def mean_loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            return model(input_ids=ids, labels=ids).loss

    return model, mean_loss


def unsloth(folder: Path, ids: Tensor, policy: recompute.Policy) -> tuple[nn.Module, MeanLoss]:
    """The same model with unsloth's calls in place of PEFT's layers."""
    model = _peft_model(folder, ids.device)
    base: Any = model.get_base_model()
    recompute.use(base, policy)
    for block in base.model.layers:
        _use_unsloth_calls(block)
    norms = (m for m in base.modules() if type(m).__name__.endswith("RMSNorm"))
    for norm in norms:
        norm.forward = partial(_norm, norm)
    targets = ids[:, 1:].reshape(-1)

    def mean_loss() -> Tensor:
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        rows = hidden.reshape(-1, hidden.shape[-1])
        return linear_cross_entropy(rows, base.lm_head.weight, targets) / len(targets)

    return model, mean_loss


PEERS: dict[str, Peer] = {"qtune": qtune, "peft + bitsandbytes": peft, "unsloth's calls": unsloth}


def _peft_model(folder: Path, device: torch.device) -> PeftModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": device},
        attn_implementation="sdpa",
        quantization_config=config,
    )
    base.config.use_cache = False
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear"
    )
    return get_peft_model(base, settings)


def _use_unsloth_calls(block: Any) -> None:
    """Put the joint functions in place of a Llama block's attention and MLP."""
    attention, mlp = block.self_attn, block.mlp
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    q, k, v, o = (Matrix.of(getattr(attention, name)) for name in names)
    attention.forward = partial(_attention, attention.head_dim, (q, k, v), o)
    three = [Matrix.of(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
    mlp.forward = partial(unsloth_calls.mlp, *three)


def _attention(
    size: int,
    inputs: tuple[Matrix, Matrix, Matrix],
    output: Matrix,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention, [B, T, I] of [B, T, I], as the block calls it."""
    made = unsloth_calls.projections(inputs, hidden_states)
    heads = [y.view(*y.shape[:2], -1, size).transpose(1, 2) for y in made]  # [B, H, T, D]
    q, k = rope(heads[0], heads[1], *position_embeddings)
    mixed = scaled_dot_product_attention(q, k, heads[2], is_causal=True, enable_gqa=True)
    joined = mixed.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
    return unsloth_calls.projections([output], joined), None


def _norm(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon, 0.0)
