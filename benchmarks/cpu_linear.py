"""Forward and backward of one frozen linear layer on the CPU: ours, a bf16 layer's, bitsandbytes'.

    python benchmarks/cpu_linear.py --threads 1 2

Times y = x W^T and dx = dy W in bf16 (W is frozen, so there is no third product). All variants of
a shape run in turn, round after round, so that other load on the machine hits all of them alike.
Prints a table of medians and writes benchmarks/results/cpu_linear.json. Sizes are those of
SmolLM2-135M, and a larger square.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qtune.files import write_text
from qtune.quant.linear import QuantLinear
from qtune.quant.storage import Storage

# (out features, in features); multiples of 64, because others meet a bug of bitsandbytes 0.50
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (2048, 2048)]
ROWS = [512, 1024, 2048]
RESULTS = Path(__file__).parent / "results/cpu_linear.json"
BASELINE = "bf16"


def layers(shape: tuple[int, int]) -> dict[str, nn.Module]:
    """The same random weight in every variant, frozen."""
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
    dense.weight.data.normal_(0, 0.02)
    return {
        BASELINE: dense.requires_grad_(False),
        "qtune nf4": QuantLinear.from_linear(dense),
        "qtune int8": QuantLinear.from_linear(dense, Storage("int8")),
        "bitsandbytes nf4": bitsandbytes_layer(dense),
    }


def bitsandbytes_layer(dense: nn.Linear) -> Linear4bit:
    """`Linear4bit` on the CPU, with nested scales, as QLoRA uses it."""
    layer = Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
    )
    packed, state = quantize_4bit(
        dense.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer.weight.data, layer.weight.quant_state = packed, state
    layer.weight.bnb_quantized = True
    return layer.requires_grad_(False).train()


def step_ms(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    x = x.detach().requires_grad_()
    start = time.perf_counter()
    layer(x).backward(dy)
    return (time.perf_counter() - start) * 1e3


def measure(shape: tuple[int, int], num_rows: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every round, by variant, after three rounds of warm-up."""
    variants = layers(shape)
    x = torch.randn(num_rows, shape[1], dtype=torch.bfloat16)
    dy = torch.randn(num_rows, shape[0], dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 8 or time.perf_counter() < deadline:
        for name, layer in variants.items():
            elapsed = step_ms(layer, x, dy)
            if rounds >= 3:
                times[name].append(elapsed)
        rounds += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """The median, the fastest, and the quartiles of milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "least_ms": min(times), "q1_ms": low, "q3_ms": high}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpus": os.cpu_count(),
        "amx": any("amx_bf16" in line for line in lines),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes"),
    }


def row(case: dict[str, Any]) -> str:
    """One line of the table: medians with quartiles, and their ratio to the dense layer."""
    cells = [str(case["threads"]), f"{case['out']}x{case['in']}", str(case["rows"])]
    baseline = case["variants"][BASELINE]["median_ms"]
    for name, numbers in case["variants"].items():
        spread = f"{numbers['median_ms']:.2f} ({numbers['q1_ms']:.2f}-{numbers['q3_ms']:.2f})"
        ratio = "" if name == BASELINE else f" {numbers['median_ms'] / baseline:.2f}x"
        cells.append(spread + ratio)
    return f"| {' | '.join(cells)} |"


def measure_summary(
    shape: tuple[int, int], num_rows: int, seconds: float
) -> dict[str, dict[str, float]]:
    """The summaries of `measure`, by variant."""
    return {name: summary(times) for name, times in measure(shape, num_rows, seconds).items()}


def cases(threads: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """The summaries for every number of threads, shape and number of rows."""
    for num_threads, shape, num_rows in product(threads, SHAPES, ROWS):
        torch.set_num_threads(num_threads)
        yield {
            "threads": num_threads,
            "out": shape[0],
            "in": shape[1],
            "rows": num_rows,
            "variants": measure_summary(shape, num_rows, seconds),
        }


def main() -> None:
    """Measure every case, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"environment": environment(), "cases": []}
    heads = ["threads", "O x I", "rows", *layers((64, 64))]
    print(f"Milliseconds, median (quartiles), ratio to {BASELINE}. {report['environment']}\n")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for case in cases(arguments.threads, arguments.seconds):
        report["cases"].append(case)
        print(row(case), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
