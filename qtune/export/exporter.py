"""What an exporter is, how it is found, and how a folder is written so that it is whole or not
there.

The exporters of a file are named by its name, or begin with it: `gguf-q4_k_m` is in gguf.py.
Quantized exports have two forms. `pair` is the frozen base bit for bit beside the adapter: together
exactly the trained model. `merged` is one model, the adapter merged into the original 16-bit
weights and quantized once, which loses something. A merge onto dequantized weights is never
quantized again: that rounds the adapter away.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtune.errors import UserError
from qtune.export.adapter import write_adapter
from qtune.export.folder import card, companions, manifest, scales
from qtune.export.folder.space import need_space
from qtune.export.folder.trained import Form, Trained
from qtune.export.gguf_file.check import check_model as check_llamacpp
from qtune.export.requantized import requantized
from qtune.model import codes_file, scales_file
from qtune.recipe import ExportName, Quant, Recipe

__all__ = [
    "Exporter",
    "Form",
    "Trained",
    "check",
    "check_mixture",
    "export",
    "exporter_names",
    "load_exporter",
    "write_run_adapter",
]


# exports that are no model without the base
ADAPTERS = scales.ADAPTERS
# exports that hold a mixture of experts
MIXTURES = ("adapter", "bf16", "fp16", "qtune")


class Exporter(Protocol):
    """One export format. `consumer` is the library that loads the folder."""

    consumer: str
    forms: tuple[Form, ...]
    """What it can be at all; a recipe may leave only one of them."""

    def check(self, recipe: Recipe, form: Form = "pair") -> list[str]:
        """Why a run of this recipe cannot be exported so; asked before training. Empty: it can."""
        ...

    def quant(self, recipe: Recipe) -> Quant | None:
        """How merged weights are quantized for it; None: they are not."""
        ...

    def size_bytes(self, trained: Trained) -> int:
        """About how much the weights will take on disk."""
        ...

    def write(self, trained: Trained, folder: Path) -> dict[str, Any]:
        """What qtune.json says of the form, once weights and configuration are in the folder."""
        ...

    def load(
        self, folder: Path, base_folder: Path, device: torch.device
    ) -> PreTrainedModel | PeftModel:
        """The model as its consumer loads it. Raises UserError where that is not installed."""
        ...


def exporter_names() -> list[str]:
    """The words for exports in a recipe."""
    return list(get_args(ExportName))


def load_exporter(name: str) -> Exporter:
    """The exporter of that name; raises UserError for an unknown one."""
    if name not in exporter_names():
        raise UserError(f"unknown export '{name}'; there are: {', '.join(exporter_names())}")
    found: Exporter = import_module(f"qtune.export.{_module(name)}").EXPORTERS[name]
    return found


def form_of(name: str, recipe: Recipe) -> Form:
    """The form that an export takes; `auto` is the exact pair wherever the recipe allows it."""
    forms, wanted = load_exporter(name).forms, recipe.merge.quantized
    if len(forms) == 1:
        return forms[0]
    if wanted != "auto":
        return wanted
    # where neither is possible, the pair is what the reasons are about
    merges = _problems(name, recipe, "pair") and not _problems(name, recipe, "merged")
    return "merged" if merges else "pair"


def exact_names(recipe: Recipe) -> list[str]:
    """The exports that are the very model that a run of this recipe trains."""
    return [
        name
        for name in exporter_names()
        if "pair" in load_exporter(name).forms and not _problems(name, recipe, "pair")
    ]


def check(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises UserError with every reason why a run of this recipe cannot be exported so."""
    problems = [
        f"export {name}: {why}"
        for name in names
        for why in _problems(name, recipe, form_of(name, recipe))
    ]
    if problems:
        raise UserError("\n".join(problems))


def check_model(names: Sequence[str], folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for exports that do not know the kind of model, or its tokenizer."""
    wanted = [name for name in names if "gguf" in name.split("-")]
    if wanted:
        try:
            check_llamacpp(folder, tokenizer)
        except UserError as error:
            raise UserError(f"export {wanted[0]}: {error}") from error


def check_mixture(recipe: Recipe, names: Sequence[str], layers: Iterable[str]) -> None:
    """Raises UserError for exports that cannot hold a mixture of experts, if the model is one.

    `layers` are the names of its linear layers, where quantized experts are layers of their own.
    """
    if not any(".expert_" in layer for layer in layers):
        return
    problems = [
        f"{name}: its layout has no quantized experts as qtune has them"
        for name in names
        if name not in MIXTURES
    ]
    if "qtune" in names and form_of("qtune", recipe) == "merged":
        problems.append("qtune: a mixture's experts are exported as a pair; set merge.quantized")
    if "adapter" in names and recipe.lora.experts:
        problems.append("adapter: PEFT alone has no such layers; export bf16, or drop lora.experts")
    if problems:
        raise UserError("\n".join(f"export {problem}" for problem in problems))


def export(name: str, trained: Trained, folder: Path) -> Path:
    """`folder`, written whole: weights, configuration, tokenizer and all that goes along, and
    qtune.json.

    An earlier export in its place is replaced at the end. Raises UserError where the run cannot be
    exported so, the disk is too small, or the folder holds something else.
    """
    exporter = load_exporter(name)
    problems = _problems(name, trained.recipe, trained.form)
    if problems:
        raise UserError(f"export {name}: {problems[0]}")
    check_mixture(trained.recipe, (name,), dict(trained.base.named_modules()))
    with (
        _in_place_of(folder, manifest.NAME) as partial,
        _as_written(exporter, trained, partial) as made,
    ):
        need_space(partial, exporter.size_bytes(made))
        form = exporter.write(made, partial)
        companions.write(trained.base_folder, trained.tokenizer, partial)
        facts = {"export": name, "consumer": exporter.consumer} | form
        manifest.write(partial, trained, facts, exporter.quant(trained.recipe))
        card.write(partial)
    return folder


def write_run_adapter(
    model: PeftModel,
    folder: Path,
    base: str,
    revision: str | None = None,
    tensors: dict[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a run's adapter as a PEFT folder for the model named `base`, whole or not at all.

    Trained scales and codes lie beside it in files of their own.

    `tensors` are the trained parameters by name, where the model holds only a part of each. With
    `tokenizer`, its chat template and the template's hash lie beside them.
    """
    with _in_place_of(folder, "adapter_config.json") as partial:
        write_adapter(model, partial, base, revision, tensors)
        scales_file.write(model, partial, tensors)
        codes_file.write(model, partial)
        if tokenizer is not None:
            manifest.write_template(partial, tokenizer)


def _module(name: str) -> str:
    """The file of an exporter: of those that its name begins with, the longest."""
    words = name.split("-")
    stems = ("_".join(words[:number]) for number in range(len(words), 0, -1))
    return next(stem for stem in stems if (Path(__file__).parent / f"{stem}.py").is_file())


def _problems(name: str, recipe: Recipe, form: Form) -> list[str]:
    exporter = load_exporter(name)
    quantizes = exporter.quant(recipe) is not None
    return exporter.check(recipe, form) + scales.why_not(name, recipe, form, quantizes=quantizes)


@contextmanager
def _as_written(exporter: Exporter, trained: Trained, place: Path) -> Iterator[Trained]:
    """What the exporter is given: in the merged form the merged weights, where it holds codes
    these quantized.
    """
    quant = exporter.quant(trained.recipe) if trained.form == "merged" else None
    if quant is None:
        yield trained
    else:
        with requantized(trained, quant, place.parent) as made:
            yield made


@contextmanager
def _in_place_of(folder: Path, mark: str) -> Iterator[Path]:
    """An empty folder that becomes `folder` at the end, or is removed if anything goes wrong.

    One that is there is replaced only if it has the file `mark`, which says that it is ours.
    """
    if folder.exists() and not (folder / mark).is_file():
        raise UserError(
            f"{folder} exists and was not written by qtune; move it away or choose another folder"
        )
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another run folder"
        ) from error
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
