"""`qtune sense`: what each layer loses in each format, while all others stay in 16 bits.

Two measures: what part of the layer's own output changes (weighted with the Hessian of its inputs),
and by how much the loss of the whole model changes on the same text. Codes are found as a run with
that method finds them. `qtune plan --sense` chooses formats by the file that this writes.

The model computes in float32 where that fits: a single layer in 4 bits changes the loss by some
1e-4 nats, and the roundings of a 16-bit pass alone, which any change stirs up, by 3e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from torch import Tensor, nn

from qtune.bench import weight_bytes
from qtune.data.calibration import Text, calibration_text
from qtune.errors import UserError
from qtune.machine import available_bytes
from qtune.model.calibration.fit import Wanted, fit
from qtune.model.load import load_base, load_tokenizer, register
from qtune.model.quant_config import QtuneConfig
from qtune.model.sources import resolve
from qtune.progress import bar, say
from qtune.quant.format import load_format
from qtune.quant.linear import QuantLinear
from qtune.quant.vector_linear import layer_type
from qtune.recipe import Calibration, FormatName, MethodName, Quant
from qtune.sensing import sensitivity
from qtune.sensing.layer_losses import Block, LayerLosses
from qtune.sensing.sensitivity import Header, SenseFile, Sensitivity

FORMATS: tuple[FormatName, ...] = ("int8", "int4", "int3", "int2")
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
    tokens: int = 2048,
    length: int = 256,
    out: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SenseFile:
    """Measure every linear layer of a model's blocks in every format, and write lines and a plot.

    `out` is by default sense-MODEL.jsonl here; what it holds already is not measured again. Raises
    UserError for a model or a text that cannot be had, and where `out` is of another measurement.
    """
    for name in formats:
        load_format(name)
    settings = Settings(formats, _quant(method, group_size, text, tokens, length))
    register()
    folder = resolve(model, revision=revision, report=say)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    found = calibration_text(settings.quant.calibration, [], tokenizer)
    device = PartialState().device
    dtype = _dtype(folder, device)
    dense = load_base(folder, None, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    losses = LayerLosses(dense, found.rows)
    path = out or Path(f"sense-{model.rstrip('/').rpartition('/')[2]}.jsonl")
    header = _header(model, settings, found, losses, str(dtype).removeprefix("torch."))
    file = sensitivity.start(path, header)
    _measure(losses, settings, file)
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


def _dtype(folder: Path, device: torch.device) -> torch.dtype:
    """Float32, or, where that is too large, bfloat16, with a word on what that costs."""
    if 2.5 * weight_bytes(folder) < available_bytes(device):
        return torch.float32
    say("the model does not fit in float32, so changes below 0.003 nats are noise: see the errors")
    return torch.bfloat16


def _header(model: str, settings: Settings, text: Text, losses: LayerLosses, dtype: str) -> Header:
    return Header(
        model=model,
        method=settings.quant.method,
        rotate=settings.quant.rotate,
        group_size=settings.quant.group_size,
        dtype=dtype,
        text=text.source,
        text_sha256=text.sha256,
        tokens=text.num_tokens,
        loss=losses.loss,
    )


def _measure(losses: LayerLosses, settings: Settings, file: SenseFile) -> None:
    before = len(file.found)
    with bar("blocks", losses.num_blocks) as progress:
        for block in losses:
            _measure_block(block, settings, file)
            progress.advance(words=f"{len(file.found)} measured")
    say(f"{len(file.found)} measurements in {file.path}, {before} of them from before")


def _measure_block(block: Block, settings: Settings, file: SenseFile) -> None:
    known = file.known
    missing = [
        (name, format_name)
        for name in block.layers
        for format_name in settings.formats
        if (name, format_name) not in known
    ]
    hessians = block.hessians() if missing else {}
    for name, format_name in missing:
        if name in hessians:
            file.add(_measure_layer(block, name, settings.form(format_name), hessians[name]))


def _measure_layer(block: Block, name: str, quant: Quant, hessian: Tensor) -> Sensitivity:
    assert quant.format is not None
    dense = block.layers[name]
    layer = _empty(name, dense, quant)
    figures = fit(name, layer, dense.weight, hessian, Wanted(quant, None, {})).figures
    change = block.loss_change(name, layer.dequantize(dense.weight.dtype))
    return Sensitivity(
        layer=name,
        format=quant.format,
        num_weights=dense.weight.numel(),
        size_bytes=sum(parameter.nbytes for parameter in layer.parameters()),
        output_error=figures.error or 0.0,
        loss_change=change.nats,
        standard_error=change.standard_error,
    )


def _empty(name: str, dense: nn.Linear, quant: Quant) -> QuantLinear:
    """A layer of that form and of the dense layer's sizes, without bias and codes."""
    storage = QtuneConfig.of(quant).storage(name)
    return layer_type(storage)(
        dense.in_features,
        dense.out_features,
        storage=storage,
        compute_dtype=dense.weight.dtype,
        device=dense.weight.device,
    )


def _plot(file: SenseFile) -> None:
    from qtune.sensing.sense_plot import plot

    path = file.path.with_suffix(".png")
    plot(file, path)
    say(f"plot: {path}")
