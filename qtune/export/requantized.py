"""A run whose adapter is merged into the original weights, and these quantized once, as if it had
been trained so: what every quantized export of the form `merged` is written from.

The merged weights are written in 16 bits, quantized from there as any model is, with the text of
the run where the method measures the model, and loaded. So exporters know one thing to write, the
codes of a loaded model, whichever form they write. Nothing goes through the cache: these weights
belong to one export of one run, and no later one would ask for them. They lie beside the export
while it is written.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from qtune.errors import UserError
from qtune.export.bf16 import Bf16Exporter
from qtune.export.folder import companions
from qtune.export.folder.fold import fold, foldable, replace_tensors
from qtune.export.folder.space import need_space
from qtune.export.folder.trained import Trained
from qtune.model.calibration.job import Job
from qtune.model.load import add_adapter, load_base
from qtune.model.prequantized import MOST_SHARE
from qtune.model.quant_config import QtuneConfig
from qtune.model.skeleton import meta_model
from qtune.quant.linear import QuantLinear
from qtune.recipe import Lora, Quant


@contextmanager
def requantized(trained: Trained, quant: Quant, place: Path) -> Iterator[Trained]:
    """`trained` merged and quantized as `quant` says, without an adapter, until the block ends.

    Its `base_folder` lies in the folder `place` meanwhile and is removed then. Raises UserError
    where there are no original weights, the adapter cannot be merged into them, changed nothing,
    or goes onto codes only, and where the disk is too small.
    """
    exporter = Bf16Exporter()
    with TemporaryDirectory(prefix=".merged-", dir=place) as temporary:
        folder = Path(temporary)
        need_space(folder, _size_bytes(exporter.size_bytes(trained), quant))
        merged = folder / "merged"
        merged.mkdir()
        exporter.write(replace(trained, onto="original"), merged)
        companions.write(trained.base_folder, trained.tokenizer, merged)
        base = _quantized(trained, quant, merged)
        recipe = replace(trained.recipe, quant=quant)
        model = _without_adapter(base)
        yield replace(trained, recipe=recipe, model=model, base_folder=merged, start={})


def _size_bytes(dense: int, quant: Quant) -> int:
    """The most that is on the disk at a time, of `dense` bytes in 16 bits."""
    # calibration keeps its blocks until they are all in the folder
    return dense if quant.method == "nearest" else int((1 + 2 * MOST_SHARE) * dense)


def _quantized(trained: Trained, quant: Quant, merged: Path) -> PreTrainedModel:
    """The model in the folder `merged`, quantized; what that takes lies beside the folder.

    Channel factors are folded, in the model and in the folder: no container has them.
    """
    options: dict[str, Any] = {"device": trained.base.device, "dtype": trained.dtype}
    options["trust_remote_code"] = trained.recipe.trust_remote_code
    if quant.method == "nearest":
        return load_base(merged, quant, **options)
    base = load_base(_calibrated(trained, quant, merged), None, **options)
    if quant.method == "awq":
        replace_tensors(merged, base, fold(base))
    return base


def _calibrated(trained: Trained, quant: Quant, merged: Path) -> Path:
    """The folder of the same model whose codes were found with the run's text."""
    if trained.text is None:
        raise UserError(
            f"merge.method: {quant.method} measures the model on text, and there is none; set "
            "merge.method: nearest"
        )
    # of a base that no adapter begins to make up for
    begins = replace(trained.recipe.lora, init="zero")
    recipe = replace(trained.recipe, quant=quant, lora=begins)
    folder, blocks = merged.with_name("quantized"), merged.with_name("blocks")
    folder.mkdir()
    job = Job(merged, recipe, trained.text(), blocks, trained.base.device, trained.dtype)
    if quant.method == "awq":
        options = {"trust_remote_code": recipe.trust_remote_code}
        skeleton = meta_model(AutoConfig.from_pretrained(merged, **options), recipe)
        job = replace(job, config=foldable(skeleton, QtuneConfig.of(quant)), shares=True)
    job.run(folder)
    return folder


def _without_adapter(base: PreTrainedModel) -> PeftModel:
    """The model as PEFT's, with nothing of an adapter in it."""
    layers = [name for name, layer in base.named_modules() if isinstance(layer, QuantLinear)]
    return add_adapter(base, Lora(), r=0, target_modules=layers).eval()
