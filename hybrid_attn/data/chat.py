"""Chat templates: Jinja programs, as tokenizers of Hugging Face have them, which write the messages of a conversation."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hybrid_attn import files
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer
from hybrid_attn.trees import check

Message = Mapping  # `role`, `content`, and other keys that a template may read, such as `tool_calls`
PLAIN = "chat.jinja"  # beside this file: roles as text, a turn of the assistant ends with EOS
BESIDE, CONFIG, KEY = "chat_template.jinja", "tokenizer_config.json", "chat_template"  # where a tokenizer has its own
FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class _Generation(Extension):
    """The block {% generation %}, which marks the turns of the assistant in some templates: it writes what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Template:
    """A chat template; ValueError where its text is no Jinja. It runs in a sandbox, which cannot change its arguments."""

    def __init__(self, text: str, tokenizer: ByteTokenizer | JsonTokenizer):
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _refuse, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token,
        }  # fmt: skip
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not Jinja: line {error.lineno}: {_one_line(error)}") from error

    def render(self, messages: Sequence[Message], tools: Sequence | None = None, generation_prompt: bool = False) -> str:
        """The text of `messages`; with `generation_prompt`, also the header of the assistant's turn. ValueError if it fails."""
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=generation_prompt)
        except FAILURES as error:
            raise ValueError(f"the chat template fails: {_one_line(error)}") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False) -> str:
    """Jinja's own filter would write <, > and & by their numbers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_template(path: str | None, tokenizer: str) -> str | None:
    """The text of the template in the file `path`, or else of the `tokenizer`'s own: None if that has none.

    That is chat_template.jinja beside its tokenizer.json, or `chat_template` of tokenizer_config.json; for bytes it is `PLAIN`.
    """
    if path is not None:
        check(os.path.isfile(path), f"--chat_template={path} is not a file; name a file with a Jinja template")
        return _read(Path(path))
    if tokenizer == "bytes":
        return resources.files("hybrid_attn.data").joinpath(PLAIN).read_text("utf-8")
    folder = Path(tokenizer).parent
    if (folder / BESIDE).is_file():
        return _read(folder / BESIDE)
    if not (folder / CONFIG).is_file():
        return None
    template = files.read_object(folder / CONFIG, "; name a template with --chat_template").get(KEY)
    if isinstance(template, list):  # several with names
        template = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}.get("default")
    check(isinstance(template, str | None), f"{folder / CONFIG}: its {KEY} is not text; name a template with --chat_template")
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8; name a file with a Jinja template") from error


def encoded(tokenizer: ByteTokenizer | JsonTokenizer, text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] of a text that a template wrote, and the bytes [n + 1] at which each, and EOS after them, begins.

    BOS at the beginning is left out, and so is EOS at the end, with white space after it: `with_boundaries` adds both.
    """
    ids, starts = tokenizer.encode_rendered(text)
    starts = np.append(starts, len(text))
    first = int(len(ids) > 0 and ids[0] == tokenizer.bos)
    ends = np.flatnonzero(ids[first:] == tokenizer.eos) + first
    has_eos = len(ends) > 0 and not text[starts[ends[-1] + 1] :].strip()
    last = ends[-1] if has_eos else len(ids)
    return ids[first:last], starts[first : last + 1]
