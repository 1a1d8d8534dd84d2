"""Messages in the form that a chat template takes, once it has shown that it loses none of them.

Templates disagree about tool calls: arguments are an object to most and JSON text to some
(DeepSeek), and some insist on a `content` beside the calls. So the forms are tried in a fixed
order, and the first holds in which nothing is lost.

Templates leave things out without a word: tools they do not know, calls beside a content, the
system message when an answer follows (Mistral), the thoughts of an answer. To train on such a
rendering would teach something else than the data says, so it is an error. It is found by marking
every part with private-use characters and looking for the marks.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from qtune.data.rows import Message
from qtune.data.spans import Render, RenderError

Tools = Sequence[dict[str, Any]]

_MARK = "\ue0f3{}\ue0f4"
# names that transformers takes for one
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THOUGHT_END = "</think>"


def presented(
    render_with: Callable[[Tools | None], Render], messages: Sequence[Message], tools: Tools | None
) -> list[Message]:
    """The messages as the template takes them, without keys that are qtune's own.

    `render_with(tools)` is the template. Raises RenderError where it refuses the messages or leaves
    out a part of them.
    """
    plain = [_without_weight(message) for message in messages]
    if not any("tool_calls" in message for message in plain):
        _check(render_with, plain, tools)
        return plain
    refusals = []
    for as_text, with_content in product((False, True), (False, True)):
        form = [_in_form(message, as_text, with_content) for message in plain]
        try:
            _check(render_with, form, tools)
        except RenderError as error:
            refusals.append(error)
        else:
            return form
    # the last form is the one that most templates can read, so it tells what is really wrong
    raise refusals[-1]


def _check(
    render_with: Callable[[Tools | None], Render], messages: Sequence[Message], tools: Tools | None
) -> None:
    """Raises RenderError where the rendering lacks a part of the messages, or a tool."""
    parts: list[str] = []
    marked_tools = tools and [_marked_tool(tool, parts) for tool in tools]
    last = len(messages) - 1
    marked = [_marked(message, i, i == last, parts) for i, message in enumerate(messages)]
    text = render_with(marked_tools)(marked)
    for number, part in enumerate(parts):
        if _MARK.format(number) not in text:
            raise RenderError(
                f"it leaves out {part}; name a template that does not as data.template, or take "
                "that out of the row"
            )


def _marked(message: Message, index: int, last: bool, parts: list[str]) -> Message:
    """The message with a mark in each part that a template must not lose; `parts` names them."""
    of = f"message {index + 1} ({message['role']})"
    if message["role"] != "assistant":
        return message | {"content": message["content"] + _mark(of, parts)}
    changes: Message = {}
    if last:
        changes |= _marked_thoughts(message, f"the thoughts of {of}", parts)
    if "tool_calls" in message:
        changes["tool_calls"] = [_marked_call(call, of, parts) for call in message["tool_calls"]]
    return message | changes


def _marked_thoughts(message: Message, of: str, parts: list[str]) -> Message:
    for key in _THOUGHTS:
        if message.get(key):
            return {key: message[key] + _mark(of, parts)}
    thoughts, end, answer = message.get("content", "").partition(_THOUGHT_END)
    if not end or not re.sub("<think>", "", thoughts).strip():
        return {}
    return {"content": thoughts.rstrip() + _mark(of, parts) + "\n" + end + answer}


def _marked_call(call: dict[str, Any], of: str, parts: list[str]) -> dict[str, Any]:
    name = call["function"]["name"]
    mark = _mark(f"the call of '{name}' in {of}", parts)
    return call | {"function": call["function"] | {"name": name + mark}}


def _marked_tool(tool: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    name = tool["function"]["name"]
    return tool | {"function": tool["function"] | {"name": name + _mark(f"tool '{name}'", parts)}}


def _mark(part: str, parts: list[str]) -> str:
    parts.append(part)
    return _MARK.format(len(parts) - 1)


def _in_form(message: Message, as_text: bool, with_content: bool) -> Message:
    """The message with the arguments of its calls as JSON text, and with a content if need be."""
    if "tool_calls" not in message:
        return message
    calls = [_with_text(call) for call in message["tool_calls"]]
    added = {"content": ""} if with_content and "content" not in message else {}
    return message | added | ({"tool_calls": calls} if as_text else {})


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}
