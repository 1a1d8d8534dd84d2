"""One source of rows as tokenised samples: from the cache, or read, encoded, linted and put there.

Whatever is fatal is raised while the samples are made, so what is in the cache is fit to be trained
on; what is merely odd is kept with them and told each time. Each source is cached by itself: a
change of the mix tokenises nothing again.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qtune.data.chat import continues_prompt, encode
from qtune.data.chunk import NO_ROW, Hashes
from qtune.data.findings import Finding, Findings
from qtune.data.identity import samples_key
from qtune.data.lint import Lint
from qtune.data.repeats import row_hashes
from qtune.data.rows import Mistakes, Problems, Row
from qtune.data.sample import Sample
from qtune.data.sources import read
from qtune.data.store import Samples, collected, stored
from qtune.data.suits import Form, check_form, check_single, form_of
from qtune.data.writer import Writer
from qtune.errors import UserError
from qtune.progress import bar
from qtune.recipe import Recipe
from qtune.recipe_data import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Encoded:
    """A source's samples, and what was odd about its rows."""

    source: Source
    samples: Samples
    findings: Findings


class Encoder:
    """Encodes rows one after the other, sorting out what is wrong with them.

    What is odd goes to `findings`, rows that nothing can be learned from to `unusable`, and what
    would spoil the run, most often in every row, to `fatal`.
    """

    def __init__(self, recipe: Recipe, tokenizer: "Tokenizer", unusable: Mistakes) -> None:
        self._recipe, self._tokenizer = recipe, tokenizer
        self._lint = Lint(tokenizer)
        self._unusable = unusable
        self.fatal = Problems()
        self.findings = Findings()
        self.num_samples = 0
        self.forms: dict[Form, str] = {}
        """Each form of rows with the place of the first."""

    def samples(self, row: Row) -> Iterator[tuple[Sample, Hashes]]:
        """A row's samples, the first with the hashes of the row; none where it is left out.

        Raises UserError where the objective needs other rows, and with the tenth fatal mistake.
        """
        form = form_of(row)
        if form not in self.forms:
            check_form(self._recipe.train.objective, form, row.place)
            self.forms[form] = row.place
        hashes = row_hashes(row)
        for sample in self._encode(row):
            self.num_samples += 1
            yield sample, hashes
            hashes = NO_ROW

    def finish(self, source: Source) -> None:
        """Raises UserError with the fatal mistakes, or where every row was left out."""
        self.fatal.raise_if_any()
        check_single(self.forms)
        if not self.num_samples:
            told = "\n".join(str(finding) for finding in self.findings.of("left out"))
            raise UserError(f"{source.path}: not one of its rows can be used\n{told}")

    def _encode(self, row: Row) -> list[Sample]:
        try:
            samples = encode(self._tokenizer, row, settings=self._recipe.data)
        except UserError as error:
            self._unusable.add(row.place, str(error).removeprefix(f"{row.place}: "))
            return []
        found = list(self._lint.findings(row, samples))
        for finding in found:
            self._note(finding)
        if not self.num_samples:
            self._note_prompt(row)
        return [] if any(finding.kind == "nothing learned" for finding in found) else samples

    def _note_prompt(self, row: Row) -> None:
        """Note it where the template asks for the first row's answer otherwise than it is given."""
        if len(row.messages) > 1 and not continues_prompt(self._tokenizer, row):
            problem = (
                "the chat template asks for an answer otherwise than this text goes on (it opens a "
                "thought, say): the model will be asked for what it was not trained on"
            )
            self.findings.add(Finding(row.place, problem, fatal=False, kind="other prompt"))

    def _note(self, finding: Finding) -> None:
        if finding.kind == "nothing learned":
            self._unusable.add(finding.place, finding.problem)
        elif finding.fatal:
            self.fatal.add(finding.place, finding.problem)
        else:
            self.findings.add(finding)


def encoded(
    source: Source, recipe: Recipe, tokenizer: "Tokenizer", *, builds: bool = True
) -> Encoded:
    """The source's samples; with `builds` false, once another process has made them.

    Raises UserError for what cannot be read or encoded and for rows that would spoil the run.
    """

    def fill(writer: Writer) -> dict[str, object]:
        unusable = Problems()
        encoder = Encoder(recipe, tokenizer, unusable)
        with bar(f"tokenising {source.path}") as progress:
            for row in read(source):
                for sample, hashes in encoder.samples(row):
                    writer.add(sample, hashes)
                progress.advance()
        unusable.raise_if_any()
        encoder.finish(source)
        return {"findings": encoder.findings.to_json(), "forms": encoder.forms}

    key = samples_key(source, tokenizer, recipe.data)
    made = stored(_folder_name(source), key, fill, builds=builds)
    for form, place in made.notes["forms"].items():
        check_form(recipe.train.objective, form, place)
    return Encoded(source, made.samples, Findings.from_json(made.notes["findings"]))


def glimpsed(source: Source, recipe: Recipe, tokenizer: "Tokenizer", num_rows: int) -> Encoded:
    """The samples of a stream's first rows, in memory.

    Rows that cannot be used are left out, as they will be in training; raises UserError where all
    of them cannot, where the objective needs others, and for what would spoil the run.
    """
    left_out = _LeftOut()
    encoder = Encoder(recipe, tokenizer, left_out)
    rows = islice(read(source, streaming=True, mistakes=left_out), num_rows)
    samples = collected(pair for row in rows for pair in encoder.samples(row))
    encoder.findings.merge(left_out.findings)
    encoder.finish(source)
    return Encoded(source, samples, encoder.findings)


class _LeftOut:
    """Rows that cannot be used, as findings."""

    def __init__(self) -> None:
        self.findings = Findings()

    def add(self, place: str, text: str) -> None:
        """Note a row that is left out."""
        self.findings.add(Finding(place, f"left out: {text}", False, "left out"))


def _folder_name(source: Source) -> str:
    """A name that tells people what is in the folder."""
    return re.sub(r"[^\w.-]+", "-", Path(source.path).name)[:60].strip("-.") or "data"
