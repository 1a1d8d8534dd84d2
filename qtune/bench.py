"""The bench: every model of the table is asked the same held-out tokens and test requests."""

from pathlib import Path
from typing import Any

from torch import nn

from qtune.data.collate import ROW_MULTIPLE, collate
from qtune.data.order import micro_batches
from qtune.evaluate.compare import Kind, Row, make_row
from qtune.evaluate.exact_match import score
from qtune.evaluate.generate import Answers, answer
from qtune.evaluate.perplexity import KEPT_TOKENS, Reference, SampleLoss, held_out
from qtune.progress import bar
from qtune.setup import Setup


class Bench:
    """Measures models of one run; the one measured with `keep` is what others are compared with."""

    def __init__(self, setup: Setup) -> None:
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
        self.losses: dict[str, list[SampleLoss]] = {}
        """Of each held-out sample, by the names of the models that were measured."""
        self.test = setup.data.test[: settings.answer_rows]
        self.references = [row.messages[-1]["content"] for row in self.test]

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
        self.losses[name] = likelihood.samples
        if not self.test:
            return make_row(name, kind, likelihood, **facts), None
        answers = self._answers(name, model)
        right = score(answers.texts, self.references, self._settings.metric)
        return make_row(name, kind, likelihood, score=right, answers=answers, **facts), answers

    def _answers(self, name: str, model: nn.Module) -> Answers:
        done = 0

        def advance(now: int, total: int) -> None:
            nonlocal done
            progress.advance(now - done)
            done = now

        with bar(f"answers of {name}", len(self.test)) as progress:
            return answer(
                model,
                self._setup.tokenizer,
                self.test,
                max_new_tokens=self._settings.max_new_tokens,
                batch_size=self._settings.batch_size,
                on_progress=advance,
            )


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder and in those below it."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
