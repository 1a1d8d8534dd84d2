"""`qtune plan`: which model, in which formats, for a memory; from configurations alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qtune.errors import UserError
from qtune.files import write_text
from qtune.model.load import register
from qtune.model.sources import resolve
from qtune.plan import size_bytes
from qtune.planning import fragment, show_budget
from qtune.planning.budget import Budget, find
from qtune.planning.footprint import Footprint, Request
from qtune.progress import bar, say
from qtune.quant.format import load_format
from qtune.recipe import FormatName
from qtune.sensing import sensitivity

KV_BITS = (16, 8, 4, 2)


def plan(
    models: Sequence[str],
    memory: str,
    context: int,
    *,
    serve: bool = False,
    batch: int = 1,
    kv_bits: int = 16,
    rank: int = 16,
    formats: Sequence[FormatName] | None = None,
    bits_budget: float | None = None,
    sense: Path | None = None,
    out: Path | None = None,
    trust_remote_code: bool = False,
) -> Budget:
    """Show which form of which model to take, and what else there is; write its recipe lines.

    `models` are what a recipe's `model` may be, config.json files, or folders of such folders and
    files. Raises UserError for what is no model, size or format, and where nothing fits.
    """
    request = Request(
        memory_bytes=size_bytes(memory),
        context=context,
        batch=batch,
        serve=serve,
        kv_bits=kv_bits,
        rank=rank,
    )
    _check(request)
    for format_name in formats or ():
        load_format(format_name)
    register()
    measured = None if sense is None else sensitivity.read(sense)
    given = [pair for model in models for pair in _configs(model, trust_remote_code)]
    footprints = []
    with bar("configurations", len(given)) as progress:
        for name, config in given:
            footprints.append(Footprint(name, config))
            progress.advance(words=name)
    found = find(footprints, request, formats, bits_budget, measured)
    lines = fragment.fragment(found.chosen, request)
    show_budget.budget(found, lines)
    if out is not None:
        write_text(out, lines)
        say(f"written to {out}")
    return found


def _check(request: Request) -> None:
    if request.context < 2 or request.batch < 1 or request.rank < 1:
        raise UserError("--context must be at least 2, --batch and --rank at least 1")
    if request.kv_bits not in KV_BITS:
        raise UserError(f"--kv-bits {request.kv_bits}: take one of {KV_BITS}")
    if request.kv_bits != 16 and not request.serve:
        raise UserError("--kv-bits is for --serve: training keeps no keys and values")


def _configs(model: str, trust_remote_code: bool) -> Iterator[tuple[str, Any]]:
    """Names and configurations of what the word stands for; UserError where it is no model."""
    for path in _places(model):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: no model configuration ({error})") from error
        yield (model if len(_places(model)) == 1 else str(path)), config


def _places(model: str) -> list[Path]:
    """Folders or files with a configuration: one, or those in a folder of several."""
    path = Path(model).expanduser()
    if (path.suffix == ".json" and path.is_file()) or (path / "config.json").is_file():
        return [path]
    if path.is_dir():
        inside = [*path.glob("*/config.json"), *path.glob("*.json")]
        if inside:
            return sorted(p.parent if p.name == "config.json" else p for p in inside)
    return [resolve(model, report=say, weights=False)]
