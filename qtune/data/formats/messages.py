"""Conversations as chat templates take them: `messages` with role and content, and `tools`.

The system prompt may be a column of its own.
"""

from qtune.data.format import Format, Parts, Record
from qtune.data.messages import conversation, with_system
from qtune.data.tools import checked_tools


def _parts(record: Record) -> Parts:
    messages = with_system(conversation(record["messages"]), record.get("system"))
    return Parts(messages, tools=checked_tools(record.get("tools")))


FORMAT = Format((frozenset({"messages"}),), frozenset({"system", "tools"}), _parts)
