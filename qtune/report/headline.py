"""What a run achieved in one sentence, and the few figures beside it, from what it has left."""

from typing import Any

from qtune.evaluate.table_print import METRICS
from qtune.report import numbers
from qtune.report.files import Files

ARROW = " → "


def sentence(files: Files) -> str:
    """The result: what changed, in which time, at which size; what is missing is left out."""
    parts = [_change(files), _time(files), _size(files)]
    said = "; ".join(part for part in parts if part)
    return f"{said[0].upper()}{said[1:]}." if said else "Nothing has been trained yet."


def facts(files: Files) -> list[tuple[str, str, str]]:
    """Name, value and a note of the figures under the sentence."""
    found = []
    if files.plan:
        trained = numbers.short(files.plan["num_trained"])
        frozen = f"beside {numbers.short(files.plan['num_parameters'])} frozen"
        found.append(("Trained parameters", trained, frozen))
    if files.training:
        last = files.training[-1]
        speed = f"{last['tokens'] / last['seconds']:,.0f} tokens/s on average"
        found.append(("Training time", numbers.duration(last["seconds"]), speed))
        read = f"{numbers.short(last['supervised_tokens'])} supervised"
        found.append(("Tokens read", numbers.short(last["tokens"]), read))
    if files.peak_bytes is not None:
        planned = f"{numbers.memory(files.plan['memory']['total'])} planned" if files.plan else ""
        found.append(("Peak memory", numbers.memory(files.peak_bytes), planned))
    return found


def _change(files: Files) -> str:
    base, tuned = _row(files, "base") or _row(files, "quantized"), _trained(files)
    if base and tuned and base["exact_match"] is not None and tuned["exact_match"] is not None:
        scores = ARROW.join(
            numbers.score(row["exact_match"], row["answers"]) for row in (base, tuned)
        )
        name = METRICS[tuned["metric"] or "exact_match"]
        return f"{name} {scores} on {tuned['answers']} unseen requests"
    if files.judged and files.held_out and "held_out_accuracy" in files.held_out[-1]:
        share = numbers.percent(files.held_out[-1]["held_out_accuracy"])
        return f"{share} of held-out rows judged rightly"
    if base and tuned:
        losses = ARROW.join(numbers.decimal(row["loss"], 3) for row in (base, tuned))
        return f"held-out loss {losses} over {numbers.whole(tuned['tokens'])} tokens"
    if files.training:
        first, last = files.training[0], files.training[-1]
        losses = ARROW.join(numbers.decimal(row["loss"], 3) for row in (first, last))
        return f"training loss {losses} in {last['step']} steps"
    return ""


def _time(files: Files) -> str:
    if not files.training:
        return ""
    return f"{numbers.duration(files.training[-1]['seconds'])} of training"


def _size(files: Files) -> str:
    base, tuned = _row(files, "base"), _trained(files)
    if not (base and tuned):
        return ""
    return f"{numbers.disk(tuned['size_bytes'])} instead of {numbers.disk(base['size_bytes'])}"


def _trained(files: Files) -> dict[str, Any] | None:
    """The trained model's row."""
    table = files.evaluation or {"trained": None, "rows": []}
    return next((row for row in table["rows"] if row["name"] == table["trained"]), None)


def _row(files: Files, kind: str) -> dict[str, Any] | None:
    """The first row of that kind in the evaluation."""
    rows = files.evaluation["rows"] if files.evaluation else []
    return next((row for row in rows if row["kind"] == kind), None)
