"""The recipe's `train` section: what is optimized, how, and what is saved and watched."""

from dataclasses import dataclass, field
from typing import Literal

from qtune.errors import UserError, check_at_least

ObjectiveName = Literal["sft", "pretrain", "dpo", "orpo", "kto", "simpo"]
OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "muon"
]
ScheduleName = Literal["cosine", "linear", "constant", "wsd", "one_cycle"]
BETAS = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Settings of the objectives that learn from preferences (dpo, orpo, kto, simpo)."""

    beta: float | None = None
    """Strength: 0.1, and 2.0 for simpo; for orpo the weight of its odds ratio."""
    margin: float = 0.5
    """simpo: by how much the chosen answer is to be better (gamma)."""
    label_smoothing: float = 0.0
    """dpo: share of pairs that are taken to be the wrong way round."""
    desirable_weight: float = 1.0
    """kto: weight of good answers."""
    undesirable_weight: float = 1.0
    """kto: weight of bad answers."""

    def __post_init__(self) -> None:
        if self.beta is not None and self.beta <= 0:
            raise UserError(f"train.preference.beta ({self.beta}) must be positive")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"train.preference.label_smoothing ({self.label_smoothing}) must be in [0, 0.5)"
            )
        least = "margin", "desirable_weight", "undesirable_weight"
        check_at_least(self, "train.preference", 0, *least)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimization."""

    objective: ObjectiveName = "sft"
    """sft: answers; pretrain: plain text; dpo, orpo, simpo: pairs of answers; kto: good and bad."""
    preference: Preference = field(default_factory=Preference)
    """Settings of dpo, orpo, kto and simpo."""
    steps: int | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = None
    """Passes over the training rows; give this or `steps`."""
    batch_size: int = 16
    """Samples per optimizer step, over all devices."""
    micro_batch_tokens: int = 4096
    """Most tokens in one forward pass on one device; the rest of the batch is accumulated."""
    optimizer: OptimizerName = "adamw"
    """8-bit and paged ones are bitsandbytes', for GPUs; muon takes matrices, AdamW the rest."""
    lr: float = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: float = 1.0
    """LoRA+ (arXiv 2402.12354): the learning rate of B matrices over that of A; 16 is usual."""
    schedule: ScheduleName = "cosine"
    """Shape of the learning rate after warm-up; all but constant end at zero, or next to it."""
    decay_steps: int | None = None
    """wsd: steps of its linear decay at the end; none: a fifth of all."""
    warmup_steps: int = 0
    """Steps of linear warm-up; one_cycle: its way up instead, 0: three tenths of the run."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    betas: tuple[float, float] | None = None
    """Moment decay rates; none: the optimizer's own. The first is muon's momentum."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null switches clipping off."""
    neftune_alpha: float | None = None
    """NEFTune (arXiv 2310.05914): scale of the noise on embeddings; 5 is usual."""
    ema_decay: float | None = None
    """Evaluates and keeps a moving average of the adapter instead of its last state; e.g. 0.99."""
    merge_aware: bool = False
    """Trains through the codes that are served: those nearest to the weights with their update."""
    merge_aware_from: float = 0.3
    """merge_aware sets in after this share of the steps, which are plain QLoRA; 0: at once."""
    merge_aware_originals: bool = True
    """merge_aware rounds from the original weights, a byte each; calibrated bases have no use."""
    recompute: Literal["auto", "none", "cheap", "all"] = "auto"
    """Redone in the backward pass: none, cheap (no matrix product), all; auto: what must be."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several devices: ddp, a whole model on each; fsdp, the quantized base sharded over them."""
    eval_every: int = 50
    """Steps between held-out losses; 0 evaluates only at the end."""
    keep_best: bool = False
    """Ends with the adapter of the lowest held-out loss, not with the last."""
    patience: int | None = None
    """Stops after so many held-out losses in a row without a new lowest."""
    spike_factor: float | None = None
    """Leaves out a step whose gradient norm is so many times the median of the last 50; e.g. 10."""
    sample_every: int = 0
    """Steps between answers to the first test rows, logged; 0: none."""
    save_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("train needs either steps or epochs, and not both")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"train.epochs ({self.epochs}) must be positive")
        for key in ("lr", "max_grad_norm", "lora_plus_ratio", "neftune_alpha"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                null = "; null switches it off" if key in ("max_grad_norm", "neftune_alpha") else ""
                raise UserError(f"train.{key} ({value}) must be positive{null}")
        for beta in self.betas or ():
            if not 0 <= beta < 1:
                raise UserError(f"train.betas ({beta}) must be in [0, 1)")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"train.ema_decay ({self.ema_decay}) must be between 0 and 1")
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise UserError(f"train.spike_factor ({self.spike_factor}) must be greater than 1")
        _at_least(self, 1, "steps", "batch_size", "micro_batch_tokens", "keep", "patience")
        _at_least(self, 1, "decay_steps")
        _at_least(self, 0, "warmup_steps", "weight_decay", "eval_every", "save_every")
        _at_least(self, 0, "sample_every")
        self._check_steps()
        self._check_watch()
        self._check_merge_aware()

    @property
    def beta(self) -> float:
        """The strength of the preference objective."""
        given = self.preference.beta
        return BETAS[self.objective] if given is None else given

    def _check_steps(self) -> None:
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise UserError(
                f"train.warmup_steps ({self.warmup_steps}) must be less than "
                f"train.steps ({self.steps})"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise UserError("train.decay_steps is for train.schedule: wsd")
        if self.steps is not None and self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise UserError(
                f"train.warmup_steps ({self.warmup_steps}) and train.decay_steps "
                f"({self.decay_steps}) together are more than train.steps ({self.steps})"
            )

    def _check_watch(self) -> None:
        for key in ("keep_best", "patience"):
            if getattr(self, key) and not self.eval_every:
                raise UserError(f"train.{key} needs train.eval_every: it goes by held-out losses")

    def _check_merge_aware(self) -> None:
        if not 0 <= self.merge_aware_from < 1:
            raise UserError(f"train.merge_aware_from ({self.merge_aware_from}) must be in [0, 1)")
        if self.merge_aware and self.parallel == "fsdp":
            raise UserError(
                "train.merge_aware makes new codes of whole layers behind each step, which "
                "train.parallel: fsdp has none of; write train.parallel: ddp"
            )


def _at_least(settings: Train, least: int, *keys: str) -> None:
    check_at_least(settings, "train", least, *keys)
