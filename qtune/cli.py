"""The command line: one verb per stage. Parses, calls `qtune.run`, prints errors.

Exit codes: 0 done, 2 something the user can mend (the message says how), 130 interrupted. What is not expected keeps
its traceback. Nothing heavy is imported before a verb is known.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from qtune.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        _run(chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; `qtune train RECIPE --resume` goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qtune", description="One recipe in, one measured model out."
    )
    parser.add_argument("--version", action="version", version=version("qtune"))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train, evaluate, merge, export and report")
    _add_recipe(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")

    check = verbs.add_parser("check", help="validate, plan and show samples; no training")
    _add_recipe(check)

    for verb, text in (
        ("eval", "measure a run's base, quantized and tuned model again"),
        ("merge", "fold a run's adapter into 16-bit weights, measured"),
        ("report", "write a run's report.html again"),
    ):
        _add_run(verbs.add_parser(verb, help=text))
    export = verbs.add_parser("export", help="write a run's model for other software, measured")
    _add_run(export)
    export.add_argument(
        "--to", nargs="+", metavar="NAME", help="which; default: those of the recipe"
    )

    chat = verbs.add_parser("chat", help="talk to a model or to what a run trained")
    chat.add_argument("model", help="run folder, model folder, hub id or .gguf file")

    verbs.add_parser("schema", help="print the recipe's JSON Schema")
    verbs.add_parser("doctor", help="show versions, devices, and what works here")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="e.g. train.lr=1e-4; checked like the file",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")


def _run(chosen: argparse.Namespace) -> None:
    match chosen.verb:
        case "schema":
            from qtune.recipe_yaml import json_schema

            print(json.dumps(json_schema(), indent=2))
        case "doctor":
            from qtune import doctor

            doctor.show()
        case "train" | "check":
            # the recipe's mistakes are shown before anything heavy is imported
            from qtune import recipe_yaml

            recipe = recipe_yaml.load(chosen.recipe, chosen.overrides)
            _quiet_libraries()
            from qtune import run

            if chosen.verb == "train":
                run.train(recipe, resume=chosen.resume)
            else:
                run.check(recipe)
        case "chat":
            _quiet_libraries()
            from qtune import chat

            chat.talk(chosen.model)
        case _:
            _run_stage(chosen)


def _run_stage(chosen: argparse.Namespace) -> None:
    """A stage of a run that has been trained."""
    from qtune import run_folder

    folder = run_folder.open_run(chosen.run)
    _quiet_libraries()
    from qtune import run

    match chosen.verb:
        case "eval":
            run.evaluate(folder)
        case "merge":
            run.export(folder, ("bf16",))
        case "export":
            run.export(folder, chosen.to or folder.recipe.export)
        case "report":
            run.report(folder)


def _quiet_libraries() -> None:
    """Keep advice meant for library users out of the output; what matters here is said by qtune."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")


if __name__ == "__main__":
    sys.exit(main())
