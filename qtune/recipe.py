"""The recipe: everything a run depends on, as frozen dataclasses.

The docstring under a field is its help text and its description in the JSON Schema. Checks that
need several fields live in `__post_init__`, so a recipe that exists is a recipe that makes sense by
itself; whether the model and the data it names exist is asked by the stages that open them.
This module imports neither torch nor pydantic: `--help` stays fast.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qtune.errors import UserError

FormatName = Literal["nf4", "int8"]
ExportName = Literal["adapter", "bf16", "bitsandbytes", "qtune"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the conversations come from and how they are read."""

    train: str
    """Training rows: a JSONL file with `messages`, a hub dataset id, or `demo:train`."""
    validation: str | None = None
    """Rows for the held-out loss during training; none: 5 % of the training rows are set aside."""
    test: str | None = None
    """Rows for the exact-match score; the last message of each is the expected answer."""
    max_length: int = 1024
    """Longest sample in tokens; a longer one is an error unless `truncate` is true."""
    truncate: bool = False
    """Cut samples at `max_length` instead of refusing them; their end goes untrained."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are supervised: every assistant turn, the last one, or all text."""

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise UserError(f"data.max_length ({self.max_length}) must be at least 8")


@dataclass(frozen=True, kw_only=True)
class Quant:
    """How the frozen base model is stored."""

    format: FormatName | None = "nf4"
    """Number format of the frozen linear layers; null keeps them in 16 bits (plain LoRA)."""
    group_size: int = 64
    """Weights that share one scale."""
    skip: tuple[str, ...] = ("lm_head",)
    """Layers that stay in 16 bits: names, or parts of names."""

    def __post_init__(self) -> None:
        if self.group_size < 16 or self.group_size & (self.group_size - 1):
            raise UserError(
                f"quant.group_size ({self.group_size}) must be a power of two, 16 or more; try 64"
            )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The trained adapter, in PEFT's terms."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Layers that get an adapter: `all-linear` or the last parts of their names."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv 2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained in full beside the adapter, e.g. lm_head; never quantized ones."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for layers whose name matches."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for layers whose name matches."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank ({self.rank}) must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout ({self.dropout}) must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimization."""

    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the training rows; give this or `steps`."""
    batch_size: int = 16
    """Samples per optimizer step, over all devices."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward pass on one device; the rest of the batch is accumulated."""
    lr: float = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at zero."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay rates."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null switches clipping off."""
    recompute: Literal["auto", "none", "cheap", "all"] = "auto"
    """Redone in the backward pass: none, cheap (no matrix product), all; auto: what must be."""
    eval_every: int = 50
    """Steps between held-out losses; 0 evaluates only at the end."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("train needs either steps or epochs, and not both")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"train.steps ({self.steps}) must be at least 1")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.epochs ({self.epochs}) must be positive")
        if self.lr <= 0:
            raise UserError(f"train.lr ({self.lr}) must be positive")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise UserError(
                f"train.max_grad_norm ({self.max_grad_norm}) must be positive, or null for none"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"train.betas ({list(self.betas)}) must be in [0, 1)")
        _at_least(self, "train", 1, "batch_size", "micro_batch_tokens", "keep")
        _at_least(self, "train", 0, "warmup_steps", "weight_decay", "eval_every", "save_every")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise UserError(
                f"train.warmup_steps ({self.warmup_steps}) must be less than "
                f"train.steps ({self.steps})"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured of every model in the table: base, quantized, tuned, merged, exported."""

    loss_rows: int = 100
    """Held-out rows for loss, perplexity, KL and top-1 agreement."""
    answer_rows: int = 100
    """Test rows that are answered and compared for the exact-match score; 0 skips it."""
    metric: Literal["exact_match", "json_match"] = "exact_match"
    """How an answer is compared: as text, or as parsed JSON (order and spacing do not count)."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    batch_size: int = 64
    """Answers generated at a time."""

    def __post_init__(self) -> None:
        _at_least(self, "evaluate", 1, "loss_rows", "max_new_tokens")
        _at_least(self, "evaluate", 0, "answer_rows")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How the adapter is folded into weights."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """What it is added to; auto measures both and takes the one with the lower held-out loss."""
    quantized: Literal["pair", "merged"] = "pair"
    """Form of quantized exports: `pair`, base and adapter, exact, or `merged`, which loses some."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where figures go besides metrics.jsonl."""

    wandb: str | None = None
    """Weights & Biases project; null switches it off (WANDB_MODE=offline works)."""
    every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        _at_least(self, "log", 1, "every")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe in, one measured model out."""

    model: str
    """Base model: hub id, folder, .gguf file, or `pypi:NAME==VERSION/FILE` inside a wheel."""
    revision: str | None = None
    """Hub branch, tag or commit of the model."""
    trust_remote_code: bool = False
    """Allow Python code that comes with the model to run."""
    data: Data
    quant: Quant = field(default_factory=Quant)
    lora: Lora = field(default_factory=Lora)
    train: Train
    evaluate: Evaluate = field(default_factory=Evaluate)
    merge: Merge = field(default_factory=Merge)
    export: tuple[ExportName, ...] = ("adapter", "bf16")
    """What is written under export/: one folder per name."""
    log: Log = field(default_factory=Log)
    run: Path
    """Run folder: everything a run writes goes there."""
    seed: int = 0
    """Seed of the adapter's start, the order of samples and dropout."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed ({self.seed}) must be at least 0 and less than 2**32")


def _at_least(section: object, name: str, least: int, *keys: str) -> None:
    for key in keys:
        value = getattr(section, key)
        if value < least:
            raise UserError(f"{name}.{key} ({value}) must be at least {least}")
