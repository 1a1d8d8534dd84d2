"""A prompt and what comes behind it: as texts, without a template, or as lists of messages."""

from qtune.data.answers import answered
from qtune.data.format import Format, Parts, Record
from qtune.data.messages import with_system
from qtune.data.tools import checked_tools


def _parts(record: Record) -> Parts:
    messages, plain = answered(record["prompt"], record["completion"], "completion")
    messages = with_system(messages, record.get("system"), plain=plain)
    return Parts(messages, tools=checked_tools(record.get("tools")), plain=plain)


FORMAT = Format((frozenset({"prompt", "completion"}),), frozenset({"system", "tools"}), _parts)
