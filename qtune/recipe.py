"""The recipe: everything a run depends on, as frozen dataclasses.

The docstring under a field is its help text and its description in the JSON Schema. Checks that
need several fields live in `__post_init__`, so a recipe that exists is a recipe that makes sense by
itself; whether the model and the data it names exist is asked by the stages that open them.
This module imports neither torch nor pydantic: `--help` stays fast.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qtune.errors import UserError, check_at_least
from qtune.recipe_data import Data
from qtune.recipe_evaluate import Evaluate
from qtune.recipe_export import ExportName, Merge
from qtune.recipe_quant import Calibration, FormatName, MethodName, Quant
from qtune.recipe_train import Train

InitName = Literal["zero", "cloq", "loftq", "pissa"]
AdapterName = Literal["lora", "scales", "lora + scales", "qa-lora"]

__all__ = [
    "Calibration",
    "Data",
    "Evaluate",
    "ExportName",
    "FormatName",
    "InitName",
    "Log",
    "Lora",
    "Merge",
    "MethodName",
    "Quant",
    "Recipe",
    "Scales",
    "Train",
]


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
    init: InitName = "zero"
    """Start: zero (B = 0); cloq, repairs outputs; loftq, weights; pissa, the weights' main part."""
    experts: bool = False
    """Adapters on the experts of a mixture too; such an adapter can only be exported merged."""
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
        if self.dora and self.experts:
            raise UserError("lora.dora is not for lora.experts; leave one of them out")
        if self.dora and self.init != "zero":
            raise UserError(f"lora.dora is not for lora.init: {self.init}; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Trained scales of quantized weights (PEQA, arXiv 2305.14152), for `adapter: scales`."""

    lr: float = 2e-5
    """Peak learning rate, in weights: a step moves a group's largest weight by about as much."""
    zeros: bool = False
    """Trains zero points too."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"scales.lr ({self.lr}) must be positive")


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where figures go besides metrics.jsonl."""

    wandb: str | None = None
    """Weights & Biases project; null switches it off (WANDB_MODE=offline works)."""
    tensorboard: bool = False
    """Write TensorBoard events under `tensorboard/` in the run folder (needs tensorboard)."""
    mlflow: str | None = None
    """MLflow experiment; null switches it off (needs mlflow; its own variables say where)."""
    every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        check_at_least(self, "log", 1, "every")


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
    adapter: AdapterName = "lora"
    """What is trained: LoRA, the quantized weights' scales, both, or LoRA on zero points."""
    lora: Lora = field(default_factory=Lora)
    train: Train
    scales: Scales = field(default_factory=Scales)
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
        self._check_adapter()
        if self.data.streaming and self.train.steps is None:
            raise UserError("data.streaming needs train.steps: the end of a stream is not known")
        if self.data.overlong == "split" and self.train.objective != "pretrain":
            raise UserError(
                "data.overlong: split is for train.objective: pretrain; truncate or drop long rows"
            )
        if self.train.sample_every and self.data.test is None:
            raise UserError("train.sample_every needs data.test: its rows are what is answered")

    def _check_adapter(self) -> None:
        if self.adapter != "lora" and self.quant.format is None:
            raise UserError(f"adapter: {self.adapter} trains quantized weights; set quant.format")
        if self.lora.init != "zero" and self.quant.format is None:
            raise UserError(
                f"lora.init: {self.lora.init} makes up for what quantization loses; set "
                "quant.format, or lora.init: zero"
            )
        if self.adapter in ("scales", "qa-lora") and self.lora.init != "zero":
            raise UserError(f"lora.init: {self.lora.init} is not for adapter: {self.adapter}")
