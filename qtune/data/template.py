"""The chat template of a tokenizer: chosen, named by its hash, and run.

Training rows, prompts of the evaluation and `qtune chat` are all rendered by `renderer`, so that
they cannot differ. A template may ask for today's date (Llama 3.2 and Mistral Small put it into the
system message). Rows rendered on two days would then differ, and a cached or resumed run with them,
so the date is always DATE, to which Meta's templates themselves fall back. transformers hands no
functions on to a template, so a macro of the same name is put before it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError, TemplateSyntaxError

from qtune.data.rows import Message
from qtune.data.spans import Render, RenderError, Span
from qtune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

DATE = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY"] + ["%-d", "%-m", "%e"]
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f' | replace("{each}", "{DATE.strftime(each)}")' for each in _DIRECTIVES)
    # the line break goes with the tag, and leaves the template at the beginning of a line
    + " }}{%- endmacro %}\n"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def use_template(tokenizer: "Tokenizer", template: str | None) -> None:
    """Give the tokenizer the template that a recipe names: a Jinja file or `chatml`; None: its own.

    Raises UserError where the file is missing or no template, naming the line, and where the
    tokenizer lacks the tokens of ChatML.
    """
    if template is None:
        return
    tokenizer.chat_template = _chatml(tokenizer) if template == "chatml" else _read(Path(template))
    try:
        renderer(tokenizer)(_PROBE)
    except RenderError as error:
        raise UserError(_problem(template, tokenizer, error)) from error


def template_of(tokenizer: "Tokenizer", tools: Sequence[dict[str, Any]] | None = None) -> str:
    """The chat template as Jinja source. Raises UserError where the tokenizer has none."""
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template: take the instruct version of the model, put a "
            "chat_template.jinja into its folder, or name one as data.template"
        )
    try:
        template: str = tokenizer.get_chat_template(tools=None if tools is None else list(tools))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise UserError(
            f"the tokenizer has several chat templates and no default ({names}); save the one you "
            "mean as a file and name it as data.template"
        ) from error
    return template


def template_hash(tokenizer: "Tokenizer") -> str:
    """SHA-256 of the chat template, in hex: two runs with the same hash saw the same format."""
    several = tokenizer.chat_template
    # old models have one template for tools and one for the rest
    one = json.dumps(several, sort_keys=True) if isinstance(several, dict) else None
    return hashlib.sha256((one or template_of(tokenizer)).encode()).hexdigest()


def template_date(tokenizer: "Tokenizer") -> str | None:
    """The date that the template is given as today's; None where it asks for none."""
    asks = "strftime_now" in template_of(tokenizer)
    return DATE.date().isoformat() if asks else None


def renderer(tokenizer: "Tokenizer", tools: Sequence[dict[str, Any]] | None = None) -> Render:
    """The template as a function of messages, with these tools. Raises UserError for none."""
    source = _dated(template_of(tokenizer, tools))

    def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        # A template may also add None to a string, or be given no messages at all.
        except (TemplateError, TypeError, ValueError) as error:
            raise RenderError(str(error)) from error
        return cast(str, text)

    return render


def marks(
    tokenizer: "Tokenizer",
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    full: str,
) -> list[Span]:
    """Spans in `full`, the rendering, within `{% generation %}`; empty where the template has none.

    They are also empty where the tracker of transformers did not see this very text.
    """
    # Imported here: the package takes seconds, and the demo and the checks do without it.
    from transformers.utils.chat_template_utils import render_jinja_template

    template = template_of(tokenizer, tools)
    if not _MARKER.search(template):
        return []
    variables: dict[str, Any] = {**tokenizer.special_tokens_map}
    rendered = render_jinja_template(
        conversations=[list(messages)],
        tools=None if tools is None else list(tools),
        chat_template=_dated(template),
        return_assistant_tokens_mask=True,
        **variables,
    )
    texts, spans = cast(tuple[list[str], list[list[Span]]], rendered)
    if texts[0] != full:
        return []
    return [(start, end) for start, end in spans[0] if full[start:end].strip()]


def _dated(template: str) -> str:
    """The template, with a clock that stands still before it where it asks for one."""
    if "strftime_now" not in template:
        return template
    return _CLOCK + template


def _chatml(tokenizer: "Tokenizer") -> str:
    known = tokenizer.get_vocab()
    missing = [token for token in ("<|im_start|>", "<|im_end|>") if token not in known]
    if missing:
        raise UserError(
            f"data.template: chatml needs the token {missing[0]}, which this tokenizer lacks, so "
            "that the model could not learn to stop; name a Jinja file that ends answers with "
            f"{tokenizer.eos_token or 'a token of the model'}"
        )
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return "{{ bos_token }}" + _CHATML if begins else _CHATML


def _read(path: Path) -> str:
    try:
        # line ends stay as they are: they are part of the hash
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template {path} cannot be read ({error}); name a Jinja file, or chatml"
        ) from error
    if not text.strip():
        raise UserError(f"data.template {path} is empty; name a Jinja file, or chatml")
    return text


def _problem(template: str, tokenizer: "Tokenizer", error: RenderError) -> str:
    """What is wrong with a template, with its line where Jinja cannot read it."""
    cause = error.__cause__
    if not isinstance(cause, TemplateSyntaxError):
        return f"data.template {template} cannot render a question and its answer: {error}"
    text = template_of(tokenizer)
    line = cause.lineno - (_dated(text).count("\n") - text.count("\n"))
    return f"{template}:{line}: data.template is no Jinja template: {cause.message}"
