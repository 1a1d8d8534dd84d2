"""`qtune compare`: formats, methods and adapter starts on the user's own model and data.

Every form of the base is made and loaded as a run would, before training, and measured on the
recipe's held-out rows and test requests against the 16-bit model: how much quality for how many
bits. Starts of adapters count as part of the form.
"""

import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich import box
from rich.table import Table as Grid
from torch import nn
from transformers import AutoConfig

from qtune.bench import Bench, weight_bytes
from qtune.comparing.comparison import COLUMNS, Comparison, Line, cells, markdown, read, write
from qtune.comparing.variants import DENSE, Variant, variants
from qtune.data.calibration import Text, calibration_text
from qtune.errors import UserError
from qtune.evaluate.paired import difference
from qtune.files import write_text
from qtune.machine import available_bytes
from qtune.model import start
from qtune.model.calibrated import calibrated_folder, is_calibrated
from qtune.model.load import add_adapter, load_base
from qtune.planning.sizes import sizes
from qtune.progress import console, say
from qtune.recipe import FormatName, InitName, Recipe
from qtune.setup import Setup, open_setup
from qtune.train.parallel import open_accelerator


def compare(
    recipe: Recipe,
    formats: Sequence[FormatName],
    methods: Sequence[str] = ("nearest",),
    inits: Sequence[InitName] = ("zero",),
    out: Path | None = None,
) -> Comparison:
    """Measure every form and write compare.json, compare.md and compare.png into a folder.

    The folder is `out`, or stands beside the recipe's run folder. What was measured before is kept.
    Raises UserError for what `open_setup` refuses, and where the 16-bit model is too large.
    """
    wanted = variants(recipe, formats, methods, inits)
    folder = out or recipe.run.with_name(f"{recipe.run.name}-compare")
    setup = open_setup(recipe, open_accelerator())
    comparer = _Comparer(setup, folder)
    for variant in wanted:
        comparer.measure(variant)
    comparer.show()
    return comparer.comparison


class _Comparer:
    """Measures forms one after the other; the 16-bit one is the reference of all."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self._setup, self._folder = setup, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._bench: Bench | None = None
        self._text: Text | None = None
        self._config = AutoConfig.from_pretrained(
            setup.base, trust_remote_code=setup.recipe.trust_remote_code
        )
        self._path = folder / "compare.json"
        self.comparison = read(self._path, _measured_on(setup))

    def measure(self, variant: Variant) -> None:
        """Put the form's line into the table, unless it is there."""
        settings = self._settings(variant)
        if self.comparison.find(variant.name, settings) is not None:
            say(f"{variant.name}: measured before")
            return
        if variant.name != DENSE:
            self._reference()
        begun = time.monotonic()
        model = self._model(variant)
        self._put(variant, settings, model, begun)

    def show(self) -> None:
        """Print the table and write it as Markdown and as a plot."""
        from qtune.comparing.comparison_plot import plot

        grid = Grid(box=box.SIMPLE_HEAD if console.is_terminal else None, padding=(0, 1))
        for place, heading in enumerate(COLUMNS):
            grid.add_column(heading, justify="right" if place else "left", no_wrap=True)
        for line in self.comparison.lines:
            grid.add_row(*cells(line))
        console.print(grid)
        write_text(self._folder / "compare.md", markdown(self.comparison.lines))
        plot(self.comparison.lines, self._folder / "compare.png")
        say(f"written to {self._folder}: compare.json, compare.md, compare.png")

    def _reference(self) -> Bench:
        """The bench, once it has seen the 16-bit model: its losses and distributions are needed."""
        if self._bench is None:
            (variant,) = variants(self._setup.recipe, ())
            begun = time.monotonic()
            self._put(variant, self._settings(variant), self._dense(), begun)
        assert self._bench is not None
        return self._bench

    def _put(self, variant: Variant, settings: str, model: nn.Module, begun: float) -> None:
        quant, dense = variant.recipe.quant, variant.name == DENSE
        bench = self._bench = self._bench or Bench(self._setup, suites=False)
        found = sizes(self._config, quant)
        adapter = _adapter_bytes(model)
        row, _ = bench.measure(
            variant.name, "base", model, keep=dense, size_bytes=found.total_bytes + adapter
        )
        change = difference(bench.losses[variant.name], bench.losses[DENSE])
        line = Line(
            name=variant.name,
            method=variant.method,
            settings=settings,
            bits=found.bits,
            model_bits=found.model_bits,
            size_bytes=found.total_bytes,
            adapter_bytes=adapter,
            loss=row.loss,
            perplexity=row.perplexity,
            nats=change.nats,
            standard_error=change.standard_error,
            kl=row.kl,
            top1=row.top1,
            exact_match=row.exact_match,
            answers=row.answers,
            seconds=time.monotonic() - begun,
        )
        self.comparison.put(line)
        write(self.comparison, self._path)
        say(f"{line.name}: {line.bits:.2f} bits, {line.nats:+.4f} nats, {line.seconds:.0f} s")

    def _model(self, variant: Variant) -> nn.Module:
        """The form as a run would load it, with the start of its adapter if that is not zero."""
        if variant.name == DENSE:
            return self._dense()
        recipe, setup = variant.recipe, self._setup
        folder = setup.base
        if is_calibrated(recipe):
            folder = calibrated_folder(folder, recipe, self._rows, device=setup.device)
        base = load_base(
            folder, recipe.quant, device=setup.device, trust_remote_code=recipe.trust_remote_code
        )
        if recipe.lora.init == "zero":
            return base
        model = add_adapter(base, recipe.lora).eval()
        start.put(model, folder / start.FILE)
        return model

    def _dense(self) -> nn.Module:
        recipe, setup = self._setup.recipe, self._setup
        size, free = weight_bytes(setup.base), available_bytes(setup.device)
        if size > free:
            raise UserError(
                f"compare measures against the 16-bit model, which takes {size / 2**30:.1f} GiB; "
                f"{free / 2**30:.1f} GiB are free"
            )
        return load_base(
            setup.base, None, device=setup.device, trust_remote_code=recipe.trust_remote_code
        )

    def _rows(self) -> Text:
        """The text of calibration, the same for all forms."""
        if self._text is None:
            settings, data = self._setup.recipe.quant.calibration, self._setup.data
            self._text = calibration_text(settings, data.feed.samples, self._setup.tokenizer)
        return self._text

    def _settings(self, variant: Variant) -> str:
        """What decides the form's weights."""
        recipe = variant.recipe
        if not is_calibrated(recipe):
            return repr(recipe.quant)
        start = "" if recipe.lora.init == "zero" else f" {recipe.lora}"
        return f"{recipe.quant}{start} {self._rows().sha256}"


def _adapter_bytes(model: nn.Module) -> int:
    """Bytes of an adapter, in the 16 bits in which one is kept in use."""
    if not isinstance(model, PeftModel):
        return 0
    return sum(2 * p.numel() for name, p in model.named_parameters() if "lora_" in name)


def _measured_on(setup: Setup) -> dict[str, Any]:
    recipe, data = setup.recipe, setup.data
    held_out = [list(sample.ids) for sample in data.held_out[: recipe.evaluate.loss_rows]]
    return {
        "model": recipe.model,
        "revision": recipe.revision,
        "held_out_rows": len(held_out),
        "held_out_sha256": sha256(repr(held_out).encode()).hexdigest(),
        "test_rows": len(data.test[: recipe.evaluate.answer_rows]),
        "metric": recipe.evaluate.metric,
    }
