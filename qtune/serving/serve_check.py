"""`qtune serve-check`: whether a server answers as the export it serves was measured to.

Each golden prompt is asked twice: as token ids, which is the model alone, and as messages, which
the server renders with a template of its own. So the model that is right under a template that is
wrong shows: the first answer is the expected one, the second is not, and the server counts other
prompt tokens.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from qtune.errors import UserError
from qtune.export.folder import golden, manifest
from qtune.model.load import load_tokenizer
from qtune.progress import console, say
from qtune.serving.answers import Compared, Expected, compare
from qtune.serving.client import Answer, RefusedError, Server
from qtune.serving.difference import Difference


@dataclass
class ServeReport:
    """What a server's check found: differences, notes, and each answer by prompt and way."""

    model: str
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answers: list[tuple[int, str, Compared]] = field(default_factory=list)


def check(url: str, folder: Path, model: str | None = None) -> None:
    """Play golden prompts against a server and show the result.

    Raises UserError with all that differs, and as `serve_check` does.
    """
    report = serve_check(url, folder, model)
    _show(report)
    if report.differences:
        found = "\n".join(f"  {difference}" for difference in report.differences)
        raise UserError(f"{url} does not serve what {folder} was measured to be:\n{found}")
    say(f"{url}: {report.model} answers as it was measured to")


def serve_check(url: str, folder: Path, model: str | None = None) -> ServeReport:
    """How a server answers the golden prompts of an exported folder.

    Raises UserError where the folder is no export or has no golden prompts, no server answers, it
    has no such model (its models are listed), or it can be asked neither way.
    """
    written = manifest.read(folder)
    if not written["golden"]:
        raise UserError(f"{folder} has no golden prompts: its export was never loaded")
    tokenizer, server = load_tokenizer(folder), Server(url)
    report = ServeReport(server.choose(model))
    for number, entry in enumerate(written["golden"], start=1):
        expected = Expected(entry, tokenizer, written["stop_ids"])
        asked = [
            _completion(server, report, expected, number),
            _chat(server, report, expected, number),
        ]
        for way, answer in zip(("completion", "chat"), asked, strict=True):
            if answer is not None:
                _judge(report, number, way, expected, answer)
    if not report.answers:
        raise UserError(f"{url} takes no prompts: " + "; ".join(dict.fromkeys(report.notes)))
    return report


def _completion(
    server: Server, report: ServeReport, expected: Expected, number: int
) -> Answer | None:
    """The answer to the prompt as token ids, or as text where the server takes no ids."""
    entry, refusal = expected.entry, ""
    for prompt in (entry["prompt_ids"], entry["text"]):
        if prompt is None:
            continue
        try:
            return server.complete(report.model, prompt, expected.max_tokens)
        except RefusedError as error:
            refusal = str(error)
    report.notes.append(f"golden prompt {number}: no completion: {refusal}")
    return None


def _chat(server: Server, report: ServeReport, expected: Expected, number: int) -> Answer | None:
    """The answer to the messages; None where there are none, or the server takes none."""
    entry = expected.entry
    if entry["messages"] is None:
        return None
    try:
        return server.chat(report.model, entry["messages"], entry["tools"], expected.max_tokens)
    except RefusedError as error:
        report.notes.append(f"golden prompt {number}: no chat: {error}")
        return None


def _judge(report: ServeReport, number: int, way: str, expected: Expected, answer: Answer) -> None:
    """Put what is to be said of an answer into the report."""
    compared = compare(expected, answer)
    report.answers.append((number, way, compared))
    where = f"golden prompt {number}, {way}"
    told = [compared.what] if compared.what else []
    if compared.change is not None and not compared.change <= golden.MAX_CHANGE:
        told.append(
            f"log-probabilities differ by {compared.change:.3f} nats (limit {golden.MAX_CHANGE})"
        )
    told += _prompt(expected.entry, way, answer)
    report.differences += [Difference(where, what) for what in told]


def _prompt(entry: dict[str, Any], way: str, answer: Answer) -> list[str]:
    """What the length of the prompt says of the server's template and tokenizer."""
    found, wanted = answer.prompt_tokens, len(entry["prompt_ids"])
    if found in (None, wanted):
        return []
    why = "it has another chat template" if way == "chat" else "it has another tokenizer"
    if found == wanted + 1:
        why += ", or adds a BOS token of its own"
    return [f"the server counts {found} prompt tokens, and there should be {wanted}: {why}"]


def _show(report: ServeReport) -> None:
    """Print how each prompt was answered."""
    for note in dict.fromkeys(report.notes):
        say(f"note: {note}")
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column(f"golden prompt, {report.model}")
    table.add_column("asked as")
    table.add_column("log-probabilities differ by (nats)", justify="right")
    table.add_column("answer")
    for number, way, found in report.answers:
        change = "-" if found.change is None else f"{found.change:.4f}"
        words = "the same up to a tie" if found.tie else "differs" if found.what else "the same"
        table.add_row(str(number), way, change, words)
    console.print(table)
