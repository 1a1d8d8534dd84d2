"""The command line: one verb per stage. Parses, calls `qtune.run`, prints errors.

Exit codes: 0 done, 2 something the user can mend (the message says how), 130 interrupted by Ctrl-C,
143 by SIGTERM. What is not expected keeps its traceback. Nothing heavy is imported before a verb is
known.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from qtune import cli_low_bits, cli_serving
from qtune.cli_serving import add_overrides
from qtune.errors import UserError
from qtune.interrupt import Interrupted, at_once

# options with several values; KEY=VALUE behind them is an override all the same
LISTS = {"allow", "formats", "methods", "inits", "to"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    chosen = _parse(given)
    try:
        if _wants_ranks(chosen):
            from qtune import launch

            return launch.start(given, chosen.nproc)
        _run(chosen)
    except UserError as error:
        _complain(f"error: {error}")
        return 2
    except KeyboardInterrupt as end:
        _complain(f"interrupted{_how_to_go_on(chosen)}")
        return end.exit_code if isinstance(end, Interrupted) else 130
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line taken apart; overrides may also come behind options."""
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if rest and ("overrides" not in chosen or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        chosen.overrides += rest
    for option in LISTS & vars(chosen).keys() if "overrides" in chosen else ():
        given = getattr(chosen, option)
        chosen.overrides += [text for text in given if "=" in text]
        setattr(chosen, option, [text for text in given if "=" not in text])
    return chosen


def _wants_ranks(chosen: argparse.Namespace) -> bool:
    """Whether this process is to start the ranks of a run, and is none of them itself."""
    return chosen.verb == "train" and chosen.nproc is not None and "RANK" not in os.environ


def _complain(text: str) -> None:
    """Print to stderr, with the number of the process where it is not the first of its run."""
    rank = os.environ.get("RANK", "0")
    print(text if rank == "0" else f"process {rank}: {text}", file=sys.stderr)


def _how_to_go_on(chosen: argparse.Namespace) -> str:
    """The command that resumes a run, once there is something to resume."""
    if chosen.verb != "train" or not _has_begun(chosen):
        return ""
    ranks = [] if chosen.nproc is None else ["--nproc", str(chosen.nproc)]
    words = ["qtune", "train", str(chosen.recipe), *chosen.overrides, *ranks, "--resume"]
    return f"; `{shlex.join(words)}` goes on from the last checkpoint"


def _has_begun(chosen: argparse.Namespace) -> bool:
    from qtune import recipe_yaml

    recipe = recipe_yaml.load(chosen.recipe, chosen.overrides)
    return (recipe.run / "recipe.yaml").is_file()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qtune", description="One recipe in, one measured model out."
    )
    parser.add_argument("--version", action="version", version=version("qtune"))
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train, evaluate, merge, export and report")
    _add_recipe(train)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    train.add_argument(
        "--allow",
        nargs="+",
        default=[],
        metavar="KEY",
        help="with --resume: keys or sections of the recipe that may have changed, e.g. train.lr",
    )
    train.add_argument("--nproc", type=int, metavar="N", help="train on N devices of this machine")

    check = verbs.add_parser("check", help="validate, plan and show samples; no training")
    _add_recipe(check)
    check.add_argument(
        "--memory", metavar="SIZE", help="plan for GPUs that are not here, e.g. 24GiB"
    )
    check.add_argument("--nproc", type=int, default=1, metavar="N", help="plan for N devices")

    low_bits = cli_low_bits
    low_bits.add_plan(verbs.add_parser("plan", help="which model in which formats for a memory"))
    low_bits.add_sense(verbs.add_parser("sense", help="what each layer loses in each format"))
    compare = verbs.add_parser("compare", help="formats and methods on your own model and data")
    _add_recipe(compare)
    low_bits.add_compare(compare)

    evaluate = verbs.add_parser("eval", help="measure a run's models again")
    _add_run(evaluate)
    add_overrides(evaluate, "e.g. evaluate.tasks=[gsm8k]")
    _add_run(verbs.add_parser("report", help="write a run's report.html again"))
    serving = cli_serving
    serving.add_merge(verbs.add_parser("merge", help="fold a run's adapter into 16-bit weights"))
    serving.add_export(verbs.add_parser("export", help="write a run's model for other software"))
    serving.add_verify(verbs.add_parser("verify", help="check an export after a copy"))
    serving.add_push(verbs.add_parser("push", help="upload an export to the Hugging Face hub"))
    serving.add_serve_check(
        verbs.add_parser("serve-check", help="play an export's golden prompts against a server")
    )

    chat = verbs.add_parser("chat", help="talk to a model or to what a run trained")
    chat.add_argument("model", help="run folder, model folder, hub id or .gguf file")
    chat.add_argument("--kv-bits", type=int, choices=(8, 4, 2), help="bits of keys and values")

    verbs.add_parser("schema", help="print the recipe's JSON Schema")
    verbs.add_parser("doctor", help="show versions, devices, and what works here")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="YAML file")
    add_overrides(parser, "e.g. train.lr=1e-4; checked like the file")


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
        case "train" | "check" | "compare":
            # the recipe's mistakes are shown before anything heavy is imported
            from qtune import recipe_yaml

            recipe = recipe_yaml.load(chosen.recipe, chosen.overrides)
            _quiet_libraries()
            if chosen.verb == "compare":
                cli_low_bits.compare(chosen, recipe)
                return
            from qtune import run

            if chosen.verb == "train":
                # whoever stops the run this way is also told how to go on
                signal.signal(signal.SIGTERM, at_once)
                run.train(recipe, resume=chosen.resume, allow=chosen.allow)
            else:
                run.check(recipe, chosen.memory, chosen.nproc)
        case "plan":
            _quiet_libraries()
            cli_low_bits.plan(chosen)
        case "sense":
            _quiet_libraries()
            cli_low_bits.sense(chosen)
        case "chat":
            _quiet_libraries()
            from qtune import chat

            chat.talk(chosen.model, chosen.kv_bits)
        case "verify" | "push" | "serve-check":
            _quiet_libraries()
            cli_serving.run(chosen)
        case _:
            _run_stage(chosen)


def _run_stage(chosen: argparse.Namespace) -> None:
    """A stage of a run that has been trained."""
    from qtune import run_folder

    folder = run_folder.open_run(chosen.run, getattr(chosen, "overrides", ()))
    _quiet_libraries()
    from qtune import run

    match chosen.verb:
        case "eval":
            run.evaluate(folder)
        case "merge":
            run.export(folder, ("bf16",), force=chosen.force)
        case "export":
            run.export(folder, cli_serving.names(chosen, folder.recipe), force=chosen.force)
        case "report":
            run.report(folder)


def _quiet_libraries() -> None:
    """Keep advice meant for library users out of the output; what matters here is said by qtune."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # what peft and transformers tell each other about renamed attributes
    warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|peft)")
    # it misses an optional kernel on the CPU that nothing here calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
