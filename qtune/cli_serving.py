"""The verbs for what is served: merge, export, verify, push, serve-check."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qtune.errors import UserError
from qtune.recipe import Recipe


def add_merge(parser: argparse.ArgumentParser) -> None:
    """The arguments of `qtune merge`."""
    parser.add_argument("run", type=Path, help="run folder")
    add_overrides(parser, "e.g. merge.method=nearest")
    parser.add_argument(
        "--force", action="store_true", help="also where the tuning is lost (merge.recovery)"
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """The arguments of `qtune export`."""
    add_merge(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--to",
        nargs="+",
        default=[],
        metavar="NAME",
        help="which; default: those of the recipe",
    )
    which.add_argument(
        "--exact", action="store_true", help="all that are the very model that was trained"
    )


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Values of the recipe on the command line."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=example)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """The arguments of `qtune verify`."""
    parser.add_argument("folder", type=Path, help="folder of an export")
    parser.add_argument(
        "--with", dest="consumer", metavar="NAME", help="library that loads it; default: its own"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="an adapter's base; default: found by qtune.json"
    )


def add_push(parser: argparse.ArgumentParser) -> None:
    """The arguments of `qtune push`."""
    parser.add_argument("folder", type=Path, help="folder of an export")
    parser.add_argument("repo", metavar="ORG/NAME", help="the model's name on the hub")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded")
    parser.add_argument(
        "--base", metavar="ORG/NAME", help="the base's name on the hub, where it was a folder here"
    )


def add_serve_check(parser: argparse.ArgumentParser) -> None:
    """The arguments of `qtune serve-check`."""
    parser.add_argument("url", help="of an OpenAI-compatible server, e.g. http://localhost:8000")
    parser.add_argument("folder", type=Path, help="folder of the export that it serves")
    parser.add_argument("--model", metavar="NAME", help="the model's name on the server")


def names(chosen: argparse.Namespace, recipe: Recipe) -> Sequence[str]:
    """The exports that `qtune export` was asked for. UserError where no exact one is possible."""
    if not chosen.exact:
        return chosen.to or recipe.export
    from qtune.export.exporter import exact_names

    found = exact_names(recipe)
    if not found:
        raise UserError(
            f"no export holds exactly what quant.format: {recipe.quant.format} and adapter: "
            f"{recipe.adapter} train; `qtune export RUN --to bf16` merges and measures"
        )
    return found


def run(chosen: argparse.Namespace) -> None:
    """Do what a verb that works on an exported folder says."""
    match chosen.verb:
        case "verify":
            from qtune.serving import verify_folder

            verify_folder.check(chosen.folder, chosen.consumer, chosen.base)
        case "push":
            from qtune.serving import push

            push.push(
                chosen.folder,
                chosen.repo,
                private=chosen.private,
                dry_run=chosen.dry_run,
                base=chosen.base,
            )
        case "serve-check":
            from qtune.serving import serve_check

            serve_check.check(chosen.url, chosen.folder, chosen.model)
