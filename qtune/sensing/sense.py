"""`qtune sense`: what each layer loses in each format, while all others stay in 16 bits.

Two measures: what part of the layer's own output changes (weighted with the Hessian of its inputs),
and how far that moves the predictions of the whole model (`divergence`). The second is what layers
can be compared by: an error of one part in a hundred is nothing in one layer and much in another.
Codes are found as a run with that method finds them. `qtune plan --sense` chooses formats by the
file that this writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from accelerate import PartialState

from qtune.data.calibration import Text, calibration_text
from qtune.errors import UserError
from qtune.model.load import load_base, load_tokenizer, register
from qtune.model.sources import resolve
from qtune.progress import bar, say
from qtune.quant.format import load_format
from qtune.recipe import Calibration, FormatName, MethodName, Quant
from qtune.sensing import sensitivity
from qtune.sensing.gradients import Block, LayerGradients
from qtune.sensing.layer import Layer
from qtune.sensing.sensitivity import Header, SenseFile

FORMATS: tuple[FormatName, ...] = ("int8", "int4", "int3", "e8p")
ROTATED = "gptq+rotate"


@dataclass(frozen=True)
class Settings:
    """How codes are found, for which formats."""

    formats: Sequence[FormatName]
    quant: Quant
    """Of the formats' layers, but for the format."""

    def form(self, format_name: FormatName) -> Quant:
        """The settings of a layer in that format."""
        return replace(self.quant, format=format_name, rotate=self._rotates(format_name))

    def _rotates(self, format_name: FormatName) -> bool:
        return self.quant.rotate and format_name != "e8p"


def sense(
    model: str,
    *,
    text: Path,
    formats: Sequence[FormatName] = FORMATS,
    method: str = ROTATED,
    group_size: int = 64,
    tokens: int = 16384,
    length: int = 256,
    out: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SenseFile:
    """Measure every linear layer of a model's blocks in every format, and write lines and a plot.

    `out` is by default sense-MODEL.jsonl here; what it holds already is not measured again. Raises
    UserError for a model or a text that cannot be had, for a format that there is not or that the
    method cannot make, and where `out` is of another measurement.
    """
    settings = Settings(formats, _quant(method, group_size, text, tokens, length))
    for name in formats:
        load_format(name)
        settings.form(name)
    register()
    folder = resolve(model, revision=revision, report=say)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    found = calibration_text(settings.quant.calibration, [], tokenizer)
    device = PartialState().device
    dense = load_base(folder, None, device=device, trust_remote_code=trust_remote_code)
    gradients = LayerGradients(dense, found.rows)
    path = out or Path(f"sense-{model.rstrip('/').rpartition('/')[2]}.jsonl")
    file = sensitivity.start(path, _header(model, settings, found, gradients.loss))
    _measure(gradients, settings, file)
    _plot(file)
    return file


def _quant(method: str, group_size: int, text: Path, tokens: int, length: int) -> Quant:
    if method not in ("nearest", "gptq", ROTATED):
        raise UserError(f"--method {method}: take nearest, gptq or {ROTATED}")
    return Quant(
        method=cast(MethodName, method.removesuffix("+rotate")),
        rotate=method == ROTATED,
        group_size=group_size,
        calibration=Calibration(text=str(text), tokens=tokens, length=length),
    )


def _header(model: str, settings: Settings, text: Text, loss: float) -> Header:
    return Header(
        model=model,
        method=settings.quant.method,
        rotate=settings.quant.rotate,
        group_size=settings.quant.group_size,
        text=text.source,
        text_sha256=text.sha256,
        tokens=text.num_tokens,
        loss=loss,
    )


def _measure(gradients: LayerGradients, settings: Settings, file: SenseFile) -> None:
    before = len(file.found)
    num_targets = [len(row) for row in gradients.targets]
    with bar("blocks", gradients.num_blocks) as progress:
        for block in gradients:
            _measure_block(block, num_targets, settings, file)
            progress.advance(words=f"{len(file.found)} measured")
    say(f"{len(file.found)} measurements in {file.path}, {before} of them from before")


def _measure_block(
    block: Block, num_targets: list[int], settings: Settings, file: SenseFile
) -> None:
    known = file.known
    missing: dict[str, list[FormatName]] = {}
    for name in block.layers:
        formats = [it for it in settings.formats if (name, it) not in known]
        if formats:
            missing[name] = formats
    hessians, seen = (block.hessians(), block.seen()) if missing else ({}, {})
    for name in filter(seen.__contains__, missing):
        layer = Layer(name, block.layers[name], hessians[name], seen[name], num_targets)
        for format_name in missing[name]:
            file.add(layer.measure(settings.form(format_name)))


def _plot(file: SenseFile) -> None:
    from qtune.sensing.sense_plot import plot

    path = file.path.with_suffix(".png")
    plot(file, path)
    say(f"plot: {path}")
