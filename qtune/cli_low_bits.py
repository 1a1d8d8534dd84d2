"""The verbs that choose a base before there is a run: plan, sense, compare."""

import argparse
from pathlib import Path
from typing import get_args

from qtune.recipe import InitName, Recipe

VERBS = ("plan", "sense", "compare")


def add_plan(plan: argparse.ArgumentParser) -> None:
    """The options of `qtune plan`."""
    plan.add_argument("models", nargs="+", metavar="MODEL", help="model, config.json, or folder")
    plan.add_argument("--memory", required=True, metavar="SIZE", help="of the device, e.g. 24GB")
    plan.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="default: 4096")
    use = plan.add_mutually_exclusive_group()
    use.add_argument("--train", action="store_true", help="plan for training (the default)")
    use.add_argument("--serve", action="store_true", help="plan for use")
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="rows at a time")
    plan.add_argument(
        "--kv-bits",
        type=int,
        default=16,
        choices=(16, 8, 4, 2),
        help="with --serve: bits of keys and values",
    )
    plan.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapter")
    plan.add_argument("--formats", nargs="+", metavar="NAME", help="default: the usual ones")
    plan.add_argument("--bits-budget", type=float, metavar="BITS", help="a weight, with scales")
    plan.add_argument("--sense", type=Path, metavar="FILE", help="what `qtune sense` wrote")
    plan.add_argument("--out", type=Path, metavar="FILE", help="writes the lines for a recipe")
    plan.add_argument("--trust-remote-code", action="store_true")


def add_sense(sense: argparse.ArgumentParser) -> None:
    """The options of `qtune sense`."""
    sense.add_argument("model", metavar="MODEL", help="hub id, folder or file")
    sense.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text")
    sense.add_argument(
        "--formats", nargs="+", default=["int8", "int4", "int3", "e8p"], metavar="NAME"
    )
    sense.add_argument(
        "--method", default="gptq+rotate", choices=("nearest", "gptq", "gptq+rotate")
    )
    sense.add_argument("--group-size", type=int, default=64, metavar="N")
    sense.add_argument(
        "--tokens", type=int, default=16384, metavar="N", help="gradients take the first 2048"
    )
    sense.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a row")
    sense.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; a plot goes beside it")
    sense.add_argument("--revision", help="hub branch, tag or commit")
    sense.add_argument("--trust-remote-code", action="store_true")


def add_compare(compare: argparse.ArgumentParser) -> None:
    """The options of `qtune compare` beside those of a recipe."""
    compare.add_argument("--formats", nargs="+", required=True, metavar="NAME")
    compare.add_argument(
        "--methods",
        nargs="+",
        default=["nearest"],
        metavar="NAME",
        help="nearest, gptq, gptq+rotate, awq",
    )
    starts = ", ".join(get_args(InitName))
    compare.add_argument("--inits", nargs="+", default=["zero"], metavar="NAME", help=starts)
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the run")


def plan(chosen: argparse.Namespace) -> None:
    """`qtune plan`."""
    from qtune.planning import planner

    planner.plan(
        chosen.models,
        chosen.memory,
        chosen.context,
        serve=chosen.serve,
        batch=chosen.batch,
        kv_bits=chosen.kv_bits,
        rank=chosen.rank,
        formats=chosen.formats,
        bits_budget=chosen.bits_budget,
        sense=chosen.sense,
        out=chosen.out,
        trust_remote_code=chosen.trust_remote_code,
    )


def sense(chosen: argparse.Namespace) -> None:
    """`qtune sense`."""
    from qtune.sensing import sense

    sense.sense(
        chosen.model,
        text=chosen.text,
        formats=chosen.formats,
        method=chosen.method,
        group_size=chosen.group_size,
        tokens=chosen.tokens,
        length=chosen.length,
        out=chosen.out,
        revision=chosen.revision,
        trust_remote_code=chosen.trust_remote_code,
    )


def compare(chosen: argparse.Namespace, recipe: Recipe) -> None:
    """`qtune compare`; UserError: a format that there is not."""
    from qtune.comparing.compare_formats import compare
    from qtune.quant.format import load_format

    for name in chosen.formats:
        load_format(name)
    compare(recipe, chosen.formats, chosen.methods, chosen.inits, chosen.out)
