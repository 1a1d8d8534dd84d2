"""The recipe's evaluate section: what every model of a run's table is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qtune.errors import UserError, check_at_least

MetricName = Literal["exact_match", "json_match", "json_fields", "number_match", "contains"]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What is measured of every model in the table: base, quantized, tuned, merged, exported."""

    loss_rows: int = 100
    """Held-out rows for loss, perplexity, KL and top-1 agreement."""
    answer_rows: int = 100
    """Test rows that are answered and compared with what the row says; 0 skips it."""
    metric: MetricName = "exact_match"
    """How: as text, as JSON, as share of JSON fields, by the last number, or as text within."""
    max_new_tokens: int = 128
    """Longest answer in tokens."""
    batch_size: int = 64
    """Answers generated at a time."""
    kv_bits: Literal[8, 4, 2] | None = None
    """Also measures the trained model with its keys and values kept in so many bits."""
    tasks: tuple[str, ...] = ()
    """Tasks of the lm-eval harness, such as gsm8k or mmlu, or of files in task_path."""
    task_path: Path | None = None
    """Task file (YAML), or folder of such, of your own."""
    task_limit: int | None = None
    """Rows of each task; null takes all."""
    task_shots: int | None = None
    """Solved examples before each question of a task; null: as many as the task says."""
    task_chat: bool = False
    """Puts the questions of tasks through the model's chat template."""
    perplexity: Path | None = None
    """Text file, UTF-8, for bits per byte, which models of any tokenizer can be compared by."""
    perplexity_context: int = 1024
    """Tokens of that text which are read at a time."""
    perplexity_stride: int | None = None
    """Tokens to the next reading; fewer give each token more context. null: the context."""
    prompts: Path | None = None
    """Prompts (.txt, .jsonl, .yaml) whose answers by all models the report shows side by side."""

    def __post_init__(self) -> None:
        check_at_least(self, "evaluate", 1, "loss_rows", "max_new_tokens", "batch_size")
        check_at_least(self, "evaluate", 0, "answer_rows", "task_shots")
        check_at_least(self, "evaluate", 1, "task_limit", "perplexity_stride")
        check_at_least(self, "evaluate", 2, "perplexity_context")
        if self.perplexity_stride and self.perplexity_stride > self.perplexity_context:
            raise UserError(
                f"evaluate.perplexity_stride ({self.perplexity_stride}) must be at most "
                f"evaluate.perplexity_context ({self.perplexity_context}), or text is left out"
            )
        if self.task_path is not None and not self.tasks:
            raise UserError("evaluate.task_path needs evaluate.tasks: which of its tasks to run")
