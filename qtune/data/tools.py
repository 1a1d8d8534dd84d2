"""Tools and calls of tools in one form, however a data set writes them.

The form is that of `transformers.utils.get_json_schema` for a tool; a call has its name and its
arguments as an object, which templates print with `tojson` (JSON text would be quoted twice). Data
sets also have both without the "function" around them, and any part as JSON text, since a table has
no columns for objects of changing shape.
"""

from typing import Any

from qtune.data.values import BadRow, each, is_blank, kind, parsed

_CALL = '{"function": {"name": "...", "arguments": {...}}}'
_TOOL = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'


def checked_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row; None where there are none. Raises BadRow."""
    if is_blank(value):
        return None
    tools = parsed(value, "tools")
    if not isinstance(tools, list):
        raise BadRow(f"'tools' must be a list, not {kind(tools)}; write [{_TOOL}]")
    return each(tools, _tool, "tool") or None


def checked_calls(value: Any) -> list[dict[str, Any]]:
    """The tool calls of a message. Raises BadRow with faults that follow "message 3"."""
    try:
        calls = parsed(value, "tool_calls")
    except BadRow as bad:
        raise BadRow(*(f"has a call: {fault}" for fault in bad.faults)) from bad
    if not isinstance(calls, list):
        raise BadRow(f"has 'tool_calls' with {kind(calls)}; write a list of {_CALL}")
    return each(calls, _call, "has 'tool_calls': call")


def _tool(value: Any) -> dict[str, Any]:
    function = _function(parsed(value, "tool"), _TOOL)
    if "parameters" in function:
        parameters = parsed(function["parameters"], "parameters")
        if not isinstance(parameters, dict):
            raise BadRow(f"needs an object as 'parameters', not {kind(parameters)}")
        function = {**function, "parameters": parameters}
    return {"type": "function", "function": function}


def _call(value: Any) -> dict[str, Any]:
    call = parsed(value, "call")
    function = _function(call, _CALL)
    arguments = parsed(function.get("arguments") or {}, "arguments")
    if not isinstance(arguments, dict):
        raise BadRow(f"needs an object as 'arguments', not {kind(arguments)}")
    identity = call.get("id")
    if not isinstance(identity, str | None):
        raise BadRow(f"needs text as 'id', not {kind(identity)}")
    named = {"name": function["name"], "arguments": arguments}
    return {**({"id": identity} if identity else {}), "type": "function", "function": named}


def _function(value: Any, form: str) -> dict[str, Any]:
    """The object with the name: the value itself, or what it has as "function"."""
    if not isinstance(value, dict):
        raise BadRow(f"must be an object, not {kind(value)}; write {form}")
    if value.get("type") not in (None, "function"):
        raise BadRow(f"has the type {value['type']!r}; only 'function' is known")
    function = parsed(value.get("function", value), "function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or is_blank(name):
        raise BadRow(f"has no 'name'; write {form}")
    return {key: part for key, part in function.items() if key != "type"}
