"""The bench: every model of the table is asked the same held-out tokens and test requests.

And, where the recipe names them, the same tasks, text and prompts.
"""

from pathlib import Path
from typing import Any

from torch import nn

from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.order import micro_batches
from qtune.evaluate.exact_match import score
from qtune.evaluate.generate import Answers, answer, moving
from qtune.evaluate.json_fields import field_shares
from qtune.evaluate.paired import Difference, difference
from qtune.evaluate.paired_scores import p_value
from qtune.evaluate.perplexity import KEPT_TOKENS, Reference, SampleLoss, held_out
from qtune.evaluate.prompts import Suite
from qtune.evaluate.suites import Suites
from qtune.evaluate.table import Kind, Row, make_row
from qtune.progress import bar
from qtune.setup import Setup

# files that hold weights, whatever library they are for
WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".data")


class Bench:
    """Measures models of one run; the one measured with `keep` is what others are compared with.

    Without `suites` the recipe's tasks, text and prompts are left out.
    """

    def __init__(self, setup: Setup, *, suites: bool = True) -> None:
        settings = setup.recipe.evaluate
        # of a pair, the likelihood of the better answer is what tells something
        samples = [sample.chosen() for sample in setup.data.held_out[: settings.loss_rows]]
        packing = setup.recipe.data.packing
        # models that other libraries load do not pack, and see each sample in a row of its own
        groups = micro_batches(samples, setup.recipe.train.micro_batch_tokens, packing=False)
        self._setup, self._settings = setup, settings
        self._batches = [
            collate(group, setup.device, multiple=ROW_MULTIPLE, packing=packing) for group in groups
        ]
        self._reference: Reference | None = None
        self._trained: str | None = None
        self._suites = Suites(settings, setup.tokenizer) if suites else None
        self.losses: dict[str, list[SampleLoss]] = {}
        """Of each held-out sample, by the names of the models that were measured."""
        self.scores: dict[str, list[float]] = {}
        """Of each answer, by the names of the models."""
        self.test = setup.data.test[: settings.answer_rows]
        self.references = [row.messages[-1]["content"] for row in self.test]

    @property
    def suite(self) -> Suite | None:
        """The recipe's prompts with their answers so far, where it has some."""
        return None if self._suites is None else self._suites.prompts

    def measure(
        self, name: str, kind: Kind, model: nn.Module, *, keep: bool = False, **facts: Any
    ) -> tuple[Row, Answers | None]:
        """The model's row of the table, and its answers where the run has test requests.

        `facts` are what the row says beside measurements: size_bytes, consumer, exact.
        """
        kept = KEPT_TOKENS if keep else 0
        reference = None if keep else self._reference
        likelihood = held_out(model, self._batches, reference=reference, keep_tokens=kept)
        self._reference = likelihood.kept or self._reference
        self._trained = name if keep else self._trained
        self.losses[name] = likelihood.samples
        facts |= {"change": self._change(name)}
        answers = self._answers(name, model) if self.test else None
        if answers is not None:
            facts |= {"answers": answers, **self._graded(name, answers.texts)}
        if self._suites is not None:
            facts |= self._suites.measure(name, model, keep=keep)
        return make_row(name, kind, likelihood, **facts), answers

    def _change(self, name: str) -> Difference | None:
        """The loss less the trained model's; None of that one itself, and without one."""
        if self._trained in (None, name):
            return None
        return difference(self.losses[name], self.losses[self._trained])

    def _graded(self, name: str, texts: list[str]) -> dict[str, Any]:
        """What the row says of the answers."""
        metric = self._settings.metric
        found = score(texts, self.references, metric)
        self.scores[name] = found.values
        facts: dict[str, Any] = {"score": found, "metric": metric}
        if self._trained not in (None, name):
            facts["p_value"] = p_value(found.values, self.scores[self._trained])
        if metric == "json_fields":
            facts["fields"] = field_shares(texts, self.references)
        return facts

    def _answers(self, name: str, model: nn.Module) -> Answers:
        with bar(f"answers of {name}", len(self.test)) as progress:
            return answer(
                model,
                self._setup.tokenizer,
                self.test,
                max_new_tokens=self._settings.max_new_tokens,
                batch_size=self._settings.batch_size,
                on_progress=moving(progress),
            )


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder and in those below it."""
    files = (path for path in folder.rglob("*") if path.suffix in WEIGHT_FILES)
    return sum(path.stat().st_size for path in files)
