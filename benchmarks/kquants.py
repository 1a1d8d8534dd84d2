"""The errors of our GGUF encoders over those of ggml's own, and the time of both.

    python benchmarks/kquants.py --model SmolLM2-135M-Instruct

Weights are normal, heavy-tailed (Student's t with 3 degrees) and the model's down projections.
Errors are squared and summed with the importance of each input: 1, or log-normal as in real models.
Time is that of the processor for 100 million weights, with one thread. Prints a table; ggml comes
from the wheel of `xllamacpp`.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ggml_encoder import decode, ggml_encode
from torch import Tensor

from qtune.model.checkpoint import stored_tensors
from qtune.quant.kquants import encoder

ROWS = 256
FITTED = [kind for kind in encoder.KINDS if kind not in encoder.FLOATS]
Encode = Callable[[Tensor, str, Tensor | None], Tensor]


def model_rows(folder: Path) -> Tensor:
    """Rows [N, I] of all down projections, as many of each as make about ROWS."""
    found = [each for name, each in stored_tensors(folder) if name.endswith("down_proj.weight")]
    if not found:
        raise SystemExit(f"{folder} has no weights that end with down_proj.weight")
    return torch.cat([each[: -(-ROWS // len(found))] for each in found]).float()


def weights(model: Path | None) -> dict[str, Tensor]:
    """What is encoded, by its name."""
    torch.manual_seed(0)
    found = {
        "normal": torch.randn(ROWS, 1024) * 0.02,
        "heavy tails": torch.distributions.StudentT(3.0).sample((ROWS, 1024)) * 0.02,
    }
    return found if model is None else {**found, model.name: model_rows(model)}


def timed(encode: Encode, weight: Tensor, kind: str, worth: Tensor | None) -> tuple[Tensor, float]:
    """The decoded weights [O, I], and seconds for 100 million."""
    begun = time.process_time()
    encoded = encode(weight, kind, worth)
    seconds = time.process_time() - begun
    return decode(encoded, kind), seconds / weight.numel() * 1e8


def error(weight: Tensor, decoded: Tensor, worth: Tensor) -> float:
    """The sum of squared errors, each times the worth [I] of its input."""
    return float(((decoded - weight).double().square() * worth).sum())


def line(kind: str, name: str, weight: Tensor, worth: Tensor | None) -> str:
    """A line of the table."""
    ours, our_time = timed(encoder.encode, weight, kind, worth)
    theirs, their_time = timed(ggml_encode, weight, kind, worth)
    counted = torch.ones(weight.shape[1]) if worth is None else worth
    own = error(weight, ours, counted)
    ratio, share = own / error(weight, theirs, counted), own / error(weight, 0 * weight, counted)
    form = "alike" if worth is None else "weighted"
    figures = f"{share:.3g} | {ratio:.3f} | {our_time:.0f} | {their_time:.0f}"
    return f"| {kind} | {name} | {form} | {figures} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder with weights; default: none")
    parser.add_argument("--kinds", nargs="+", choices=FITTED, default=FITTED)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sources = weights(chosen.model)
    print("| type | weights | inputs | error, relative | to ggml's | s/100M | ggml s/100M |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind in chosen.kinds:
        for name, weight in sources.items():
            worth = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)).exp()
            for each in (None, worth):
                print(line(kind, name, weight, each), flush=True)


if __name__ == "__main__":
    main()
