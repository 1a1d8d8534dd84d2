"""Part (b): the kernels beside bitsandbytes', in one process, on the same codes and scales.

Rows M from decoding to training, on the shapes of Llama 3 8B and 70B, forward and backward (K2 to
K6 of the goals), dequantizing (K1), a layer with its LoRA (K7), 8 bits (K8), and INT4 against NF4
(K9). A row holds both sides' medians and quartiles, the two repeats, their spread, and whether
both computed the same.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from gpu import layers, timing
from gpu.case import Case, Context, finite
from gpu.weights import INT4, Weight, random_pair
from qtune_kernels.dequantize import dequantize
from qtune_kernels.linear import linear, linear_dx

# (O, I) of Llama 3 8B's attention and MLP, then of 70B's
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192)
QUICK_SHAPES, QUICK_ROWS = ((128, 256),), (1, 3)
# up to here launching takes longer than the work
MOST_GRAPH_ROWS = 256
RUNS, QUICK_RUNS = 50, 2
GOALS = ((1, "K2"), (16, "K3"), (256, "K4"), (1024, "K5"), (8192, "K6"))
MOST_DECODED = 16
# both round to 16 bits at different places
MOST_DIFFERENCE = 0.01


def cases(context: Context) -> list[Case]:
    """The single figures first, then every shape, direction and number of rows."""
    return list(_cases(context))


def _cases(context: Context) -> Iterator[Case]:
    shapes = QUICK_SHAPES if context.quick else SHAPES
    for shape in shapes:
        yield Case(f"dequantize {shape[0]}x{shape[1]}", partial(_dequantize, context, shape))
    for shape in shapes:
        yield Case(f"int4 {shape[0]}x{shape[1]}", partial(_int4, context, shape))
    yield from layers.cases(context)
    for shape in shapes:
        for kind, pair in (("forward", _forward), ("backward", _backward)):
            for rows in QUICK_ROWS if context.quick else ROWS:
                name = f"{kind} {shape[0]}x{shape[1]}, {rows} rows"
                yield Case(name, partial(_product, context, kind, pair, shape, rows))


class Inputs(NamedTuple):
    """One of the sets in rotation: the same matrix for both sides."""

    weight: Weight
    packed: Tensor
    state: Any


@lru_cache(maxsize=1)
def _sets(context: Context, shape: tuple[int, int]) -> list[Inputs]:
    """Matrices of a shape, more than the second-level cache holds; those before are let go."""
    torch.manual_seed(context.seed)
    first = Inputs(*random_pair(shape, context.device))
    more = timing.num_sets(first.weight.size_bytes, context.quick) - 1
    return [first, *(Inputs(*random_pair(shape, context.device)) for _ in range(more))]


def _dequantize(context: Context, shape: tuple[int, int]) -> dict[str, Any]:
    sets = _sets(context, shape)
    ours = [partial(dequantize, *each.weight.arguments, *shape, torch.bfloat16) for each in sets]
    theirs = [partial(dequantize_4bit, each.packed, each.state) for each in sets]
    copied = [
        partial(torch.empty(shape, dtype=torch.bfloat16, device=context.device).copy_, theirs[0]())
        for _ in sets
    ]
    variants = {"qtune": ours, "bitsandbytes": theirs, "copy of the result": copied}
    equal = torch.equal(ours[0](), theirs[0]())
    facts = {"goal": "K1", "kind": "dequantize", "equal": equal, "ok": equal}
    return facts | _measured(context, shape, variants, graph=True)


def _int4(context: Context, shape: tuple[int, int]) -> dict[str, Any]:
    """NF4 and INT4 on the same bytes at one row."""
    variants: dict[str, timing.Calls] = {}
    for name in ("qtune int4", "qtune nf4"):
        weights = [
            each.weight._replace(levels=INT4) if "int4" in name else each.weight
            for each in _sets(context, shape)
        ]
        variants[name] = [
            partial(linear, _rows(context, 1, shape[1]), *weight.arguments, shape[0], None)
            for weight in weights
        ]
    facts = {"goal": "K9", "kind": "forward", "rows": 1, "ok": True}
    return facts | _measured(context, shape, variants, graph=True)


def _product(
    context: Context, kind: str, pair: Callable[..., Any], shape: tuple[int, int], rows: int
) -> dict[str, Any]:
    made = [pair(context, each, rows) for each in _sets(context, shape)]
    variants = {"qtune": [ours for ours, _ in made], "bitsandbytes": [it for _, it in made]}
    with torch.no_grad():
        difference = _difference(made[0][0](), made[0][1]())
        facts = {"goal": _goal(kind, rows), "kind": kind, "rows": rows}
        facts["difference"] = finite(difference)
        facts["ok"] = difference <= MOST_DIFFERENCE
        return facts | _measured(context, shape, variants, graph=rows <= MOST_GRAPH_ROWS)


def _goal(kind: str, rows: int) -> str | None:
    """The goal that these rows belong to; decoding has no backward pass."""
    if kind == "backward" and rows <= MOST_DECODED:
        return None
    return next(goal for most, goal in GOALS if rows <= most)


def _forward(context: Context, each: Inputs, rows: int) -> tuple[Callable[[], Tensor], ...]:
    out_features, in_features = each.weight.shape
    x = _rows(context, rows, in_features)
    return (
        partial(linear, x, *each.weight.arguments, out_features, None),
        partial(matmul_4bit, x, each.packed, each.state),
    )


def _backward(context: Context, each: Inputs, rows: int) -> tuple[Callable[[], Tensor], ...]:
    """dx = dy W; bitsandbytes does it as in the backward of its `MatMul4Bit`."""
    out_features, in_features = each.weight.shape
    dy = _rows(context, rows, out_features)
    return (
        partial(linear_dx, dy, *each.weight.arguments, in_features),
        lambda: torch.matmul(dy, dequantize_4bit(each.packed, each.state).to(dy.dtype)),
    )


def _measured(
    context: Context, shape: tuple[int, int], variants: dict[str, timing.Calls], *, graph: bool
) -> dict[str, Any]:
    runs = QUICK_RUNS if context.quick else RUNS
    spent = timing.compare(variants, context.device, graph=graph, runs=runs)
    first, second = list(spent)[:2]
    return {
        "out": shape[0],
        "in": shape[1],
        "format": "nf4",
        "graph": graph and context.on_gpu,
        "sets": len(variants[first]),
        "variants": spent,
        "speedup": spent[second]["median_us"] / spent[first]["median_us"],
    }


def _rows(context: Context, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, dtype=torch.bfloat16, device=context.device)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative to theirs, root mean square; NaN where there is one."""
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())
