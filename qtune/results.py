"""The results of a run: its models, measured one after the other as they come from disk.

Everything is compared with the trained model, that is the adapter on the base it was trained on.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qtune import merging
from qtune.bench import Bench, weight_bytes
from qtune.data.calibration import calibration_text
from qtune.data.rows import Message
from qtune.evaluate import compare
from qtune.evaluate.compare import Kind, Row, Table
from qtune.evaluate.exact_match import matches
from qtune.evaluate.generate import Answers
from qtune.evaluate.long_context import cache_effect, long_rows
from qtune.export import exporter, verify
from qtune.export.folder import golden, manifest, template
from qtune.export.folder.load import NotInstalled
from qtune.export.folder.trained import Trained
from qtune.machine import available_bytes
from qtune.model import codes_file, scales_file, start
from qtune.model.adapt import load_trained
from qtune.model.folder import read_json
from qtune.model.load import load_base
from qtune.model.merge import Onto
from qtune.progress import say
from qtune.run_folder import RunFolder
from qtune.setup import Setup, stored_base

NUM_SAMPLES = 8
# held-out samples whose logits an exact export is compared on
NUM_CHECKED = 2


class Results:
    """Fills `table`, which is eval.json; making one loads and measures the trained model."""

    def __init__(self, run: RunFolder, setup: Setup) -> None:
        self._run, self._setup, self._recipe = run, setup, run.recipe
        self._bench = Bench(setup)
        self._path = run.path / "eval.json"
        self._format = self._recipe.quant.format or "16-bit"
        name = f"adapter on {self._format}"
        self.table = compare.read(self._path) if self._path.exists() else Table(name)
        data = setup.data
        self._prompts = golden.prompts(setup.tokenizer, data.test, data.held_out)
        self._trained = self._load_trained()
        size = frozen_bytes(self._trained.base) + _adapter_bytes(run)
        _, self._tuned = self._add(name, "adapter", self._trained.model, keep=True, size_bytes=size)

    def measure_bases(self) -> None:
        """Rows of the base, quantized and in 16 bits, and samples of answers before and after."""
        self._measure_quantized(again=True)
        size = weight_bytes(self._setup.base)
        if not self._fits("base 16-bit", size):
            return
        base = load_base(self._setup.base, None, device=self._setup.device)
        _, before = self._add("base 16-bit", "base", base, size_bytes=size)
        if before is not None and self._tuned is not None:
            self._run.write("samples.json", self._samples(before, self._tuned))

    def _measure_quantized(self, *, again: bool = False) -> None:
        """The row of the base without the adapter, which recovery is counted from."""
        name = f"base {self._format}"
        if self._recipe.quant.format is None or (self.table.row(name) and not again):
            return
        model = self._trained.model
        with model.disable_adapter():
            size = frozen_bytes(self._trained.base)
            self._add(name, "quantized", model, size_bytes=size)

    def measure_cache(self) -> None:
        """What keys and values in few bits do to the trained model, where the recipe asks."""
        bits = self._recipe.evaluate.kv_bits
        if bits is None:
            return
        texts = [sample.chosen().ids for sample in self._setup.data.held_out]
        rows = long_rows(texts, self._trained.base.config)
        if rows:
            self.table.kv_cache = cache_effect(self._trained.model, rows, bits)
            compare.write(self.table, self._path)
        else:
            say("evaluate.kv_bits: not measured, all held-out samples together are too short")

    def export(self, names: Sequence[str], *, force: bool = False) -> list[str]:
        """Write exports and add a row for each, as the library it is for loads it.

        Returns why merges were refused that keep too little of the tuning; with `force` none is.
        """
        refused = [self._merge(name, force) for name in names if name in merging.MERGED]
        for name in names:
            if name not in merging.MERGED:
                self._export(name, self._form(name), name, f"export {name}")
        return [text for text in refused if text]

    def _form(self, name: str) -> Trained:
        """What an export is made of: 16-bit ones of the merge that was chosen, or the trained."""
        merge = self.table.merge
        onto = merge.chosen if merge else merging.bases(self._recipe)[-1]
        return replace(self._trained, onto=onto, form=exporter.form_of(name, self._recipe))

    def _merge(self, name: str, force: bool) -> str | None:
        """Merge onto each base the recipe allows, measure, and keep the better; why it is refused.

        Where a merged model is too large to be measured, only the trained one is written.
        """
        bases = merging.bases(self._recipe)
        if not self._fits(f"export {name}", weight_bytes(self._setup.base)):
            bases = bases[-1:]
        self._measure_quantized()
        verdict = merging.judge(
            {onto: self._merge_onto(name, onto) for onto in bases}, self._recipe.merge.recovery
        )
        refused = None if force else verdict.refused
        self._keep(name, bases, None if refused else verdict.chosen)
        self.table.merge = verdict.merge
        self._run.write("merge.json", asdict(verdict) | {"layers": merging.layers(self._trained)})
        measured = self.table.row(_title(name, verdict.chosen))
        if measured and not refused:
            self._put(replace(measured, name=f"export {name}", kind="export"), measured.name)
        return refused and f"export {name}: {refused}"

    def _keep(self, name: str, bases: Sequence[Onto], chosen: Onto | None) -> None:
        """Of the folders that a merge left one by its name, or none."""
        for onto in bases:
            folder = self._run.exports / f"{name}-{onto}"
            if onto == chosen:
                shutil.rmtree(self._run.exports / name, ignore_errors=True)
                folder.rename(self._run.exports / name)
            else:
                shutil.rmtree(folder)

    def _merge_onto(self, name: str, onto: Onto) -> Row | None:
        trained = replace(self._trained, onto=onto)
        return self._export(name, trained, f"{name}-{onto}", _title(name, onto), kind="merged")

    def _export(
        self, name: str, trained: Trained, folder_name: str, title: str, kind: Kind = "export"
    ) -> Row | None:
        """Write one export, load it again, check and measure it; None where that is not possible,
        which is said.
        """
        folder = exporter.export(name, trained, self._run.exports / folder_name)
        below = weight_bytes(self._setup.base) if name in exporter.ADAPTERS else 0
        if not self._fits(title, weight_bytes(folder) + below):
            return None
        try:
            model = verify.reload(name, folder, self._setup.base, self._setup.device)
        except NotInstalled as error:
            say(f"{title}: not measured, {error}")
            return None
        exact = read_json(folder / manifest.NAME)["exact"]
        if exact:
            rows = [sample.ids for sample in self._setup.data.held_out[:NUM_CHECKED]]
            verify.check_logits(model, self._trained.model, rows)
        verify.add_golden(folder, model, self._setup.tokenizer, self._prompts)
        consumer = exporter.load_exporter(name).consumer
        size = weight_bytes(folder)
        row, _ = self._add(title, kind, model, size_bytes=size, consumer=consumer, exact=exact)
        self._tell(folder, row)
        return row

    def _tell(self, folder: Path, row: Row) -> None:
        """Write into an export what was measured of it, of the trained model and of the base."""
        trained, base = self.table.row(self.table.trained), self.table.row("base 16-bit")
        assert trained is not None
        before = None if base is None else asdict(base)
        manifest.add_results(folder, asdict(row), asdict(trained), before)

    def _fits(self, title: str, size: int) -> bool:
        """Whether a model of that size can be loaded beside the trained one; it is said if not."""
        free = available_bytes(self._setup.device)
        if size > free:
            sizes = f"it takes {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            say(f"{title}: not measured, {sizes}")
        return size <= free

    def _add(
        self, name: str, kind: Kind, model: nn.Module, **facts: Any
    ) -> tuple[Row, Answers | None]:
        """Measure a model; its row as it is in the table, and its answers."""
        row, answers = self._bench.measure(name, kind, model, **facts)
        return self._put(row), answers

    def _put(self, row: Row, instead: str | None = None) -> Row:
        """The row as it is in the table, in the place of the one of its name or of `instead`."""
        placed = self.table.put(row, instead)
        compare.write(self.table, self._path)
        suite = self._bench.suite
        if suite is not None:
            if instead is not None:
                suite.rename(instead, row.name)
            self._run.write("prompts.json", suite.beside(self._run.read("prompts.json")))
        return placed

    def _load_trained(self) -> Trained:
        recipe = self._recipe
        template.check(self._run.adapter, self._setup.tokenizer)
        base = load_base(
            stored_base(self._setup, self._run),
            recipe.quant,
            device=self._setup.device,
            trust_remote_code=recipe.trust_remote_code,
        )
        model = load_trained(base, self._run.adapter)
        begun = start.read(self._run.start)
        text = partial(
            calibration_text,
            recipe.quant.calibration,
            self._setup.data.feed.samples,
            self._setup.tokenizer,
        )
        return Trained(
            recipe, model, self._setup.tokenizer, self._setup.base, start=begun, text=text
        )

    def _samples(self, before: Answers, after: Answers) -> list[dict[str, Any]]:
        """What samples.json holds: requests with the answers of the untuned and the tuned model."""
        metric = self._recipe.evaluate.metric
        rows = zip(self._bench.test, before.texts, after.texts, self._bench.references, strict=True)
        return [
            {
                "prompt": asked_for(row.messages[:-1]),
                "before": old,
                "after": new,
                "reference": reference,
                "correct_before": matches(old, reference, metric),
                "correct_after": matches(new, reference, metric),
            }
            for row, old, new, reference in list(rows)[:NUM_SAMPLES]
        ]


def frozen_bytes(base: nn.Module) -> int:
    """Bytes of a base in memory, without an adapter's; trained scales are its own."""
    return sum(p.nbytes for name, p in base.named_parameters() if "lora_" not in name)


def _adapter_bytes(run: RunFolder) -> int:
    """Bytes of the files that an adapter is in; trained scales and codes are the base's."""
    of_base = (run.adapter / name for name in (scales_file.FILE, codes_file.FILE))
    return weight_bytes(run.adapter) - sum(p.stat().st_size for p in of_base if p.exists())


def _title(name: str, onto: Onto) -> str:
    return f"merged onto {onto}" if name == "bf16" else f"{name} merged onto {onto}"


def asked_for(messages: Sequence[Message]) -> str:
    """The last text before an answer; messages that only call tools have none."""
    return next((m["content"] for m in reversed(messages) if m.get("content")), "")
