"""The results of a run: its models, measured one after the other as they come from disk.

Everything is compared with the trained model, that is the adapter on the base it was trained on.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import nn

from qtune.bench import Bench, weight_bytes
from qtune.data.calibration import calibration_text
from qtune.data.rows import Message
from qtune.data.sample import Sample
from qtune.evaluate import compare
from qtune.evaluate.compare import Kind, Merge, Row, Table
from qtune.evaluate.exact_match import matches
from qtune.evaluate.generate import Answers
from qtune.evaluate.long_context import cache_effect, long_rows
from qtune.export import exporter, verify
from qtune.export.folder import manifest, template
from qtune.export.folder.trained import Trained
from qtune.machine import available_bytes
from qtune.model import scales_file, start
from qtune.model.adapt import load_trained
from qtune.model.folder import read_json
from qtune.model.load import load_base
from qtune.model.merge import Onto
from qtune.progress import say
from qtune.run_folder import RunFolder
from qtune.setup import Setup, stored_base

NUM_SAMPLES = 8
ORDER = get_args(Kind)
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
        self._trained = self._load_trained()
        size = frozen_bytes(self._trained.base) + _adapter_bytes(run)
        _, self._tuned = self._add(name, "adapter", self._trained.model, keep=True, size_bytes=size)

    def measure_bases(self) -> None:
        """Rows of the base, quantized and in 16 bits, and samples of answers before and after."""
        if self._recipe.quant.format is not None:
            model = self._trained.model
            with model.disable_adapter():
                size = frozen_bytes(self._trained.base)
                self._add(f"base {self._format}", "quantized", model, size_bytes=size)
        size = weight_bytes(self._setup.base)
        if not self._fits("base 16-bit", size):
            return
        base = load_base(self._setup.base, None, device=self._setup.device)
        _, before = self._add("base 16-bit", "base", base, size_bytes=size)
        if before is not None and self._tuned is not None:
            self._run.write("samples.json", self._samples(before, self._tuned))

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

    def export(self, names: Sequence[str]) -> None:
        """Write exports and add a row for each, as the library it is for loads it."""
        for name in names:
            if name == "bf16":
                self._merge()
            else:
                trained = replace(self._trained, form=exporter.form_of(name, self._recipe))
                self._export(name, trained, name, f"export {name}")

    def _merge(self) -> None:
        """Merge onto each base the recipe allows, measure, and keep the one with the lower loss.

        Where a merged model is too large to be measured, only the last is written: the trained one.
        """
        bases = self._merge_bases()
        if not self._fits("export bf16", weight_bytes(self._setup.base)):
            bases = bases[-1:]
        rows = {onto: self._merge_onto(onto) for onto in bases}
        measured = {onto: row for onto, row in rows.items() if row is not None}
        best = min(measured, key=lambda onto: measured[onto].loss) if measured else bases[-1]
        for onto in rows:
            folder = self._run.exports / f"bf16-{onto}"
            if onto == best:
                shutil.rmtree(self._run.exports / "bf16", ignore_errors=True)
                folder.rename(self._run.exports / "bf16")
            else:
                shutil.rmtree(folder)
        losses = ", ".join(f"{row.loss:.4f} onto {onto}" for onto, row in measured.items())
        self.table.merge = Merge(best, f"held-out loss {losses}" if losses else "not measured")
        if best in measured:
            row = replace(measured[best], name="export bf16", kind="export")
            self._put(row, instead=measured[best].name)

    def _merge_bases(self) -> list[Onto]:
        """What the recipe lets the adapter be merged onto.

        Without a format both are the same; trained scales are those of codes, and go onto nothing
        else.
        """
        if self._recipe.quant.format is None:
            return ["original"]
        if self._recipe.adapter != "lora":
            return ["dequantized"]
        wanted = self._recipe.merge.base
        return ["original", "dequantized"] if wanted == "auto" else [wanted]

    def _merge_onto(self, onto: Onto) -> Row | None:
        trained = replace(self._trained, onto=onto)
        return self._export("bf16", trained, f"bf16-{onto}", f"merged onto {onto}", kind="merged")

    def _export(
        self, name: str, trained: Trained, folder_name: str, title: str, kind: Kind = "export"
    ) -> Row | None:
        """Write one export, load it again, check and measure it; None where it is too large."""
        folder = exporter.export(name, trained, self._run.exports / folder_name)
        below = weight_bytes(self._setup.base) if name == "adapter" else 0
        if not self._fits(title, weight_bytes(folder) + below):
            return None
        model = verify.reload(name, folder, self._setup.base, self._setup.device)
        exact = read_json(folder / manifest.NAME)["form"] == "pair"
        if exact:
            rows = [sample.ids for sample in self._setup.data.held_out[:NUM_CHECKED]]
            verify.check_logits(model, self._trained.model, rows)
        verify.add_golden(folder, model, prompt_of(self._setup.data.held_out[0]))
        consumer = exporter.load_exporter(name).consumer
        size = weight_bytes(folder)
        row, _ = self._add(title, kind, model, size_bytes=size, consumer=consumer, exact=exact)
        return row

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
        """Measure a model and put its row into the table."""
        row, answers = self._bench.measure(name, kind, model, **facts)
        self._put(row)
        return row, answers

    def _put(self, row: Row, instead: str | None = None) -> None:
        """Put a row in the place of the one of its name, or of `instead`; else at the end."""
        rows = {known.name: known for known in self.table.rows}
        rows.pop(instead or "", None)
        rows[row.name] = row
        self.table.rows = sorted(rows.values(), key=lambda row: ORDER.index(row.kind))
        compare.write(self.table, self._path)

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
    """Bytes of the files that an adapter is in, beside the base."""
    scales = run.adapter / scales_file.FILE
    return weight_bytes(run.adapter) - (scales.stat().st_size if scales.exists() else 0)


def prompt_of(sample: Sample) -> list[int]:
    """The tokens before the first that is learned; of plain text, learned throughout, the first."""
    return list(sample.ids[: sample.supervised.index(True)])


def asked_for(messages: Sequence[Message]) -> str:
    """The last text before an answer; messages that only call tools have none."""
    return next((m["content"] for m in reversed(messages) if m.get("content")), "")
