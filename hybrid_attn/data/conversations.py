"""Documents of conversations and of pairs of completions: records with messages, which a chat template writes as text.

{"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]}
{"prompt": "What is 2 + 2?", "completion": "4"}                    texts, joined without a template, or messages
{"prompt": ..., "chosen": "4", "rejected": "5"}                    texts or messages; two documents, chosen before rejected
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.data import chat, records
from hybrid_attn.data.chat import Message
from hybrid_attn.data.documents import with_boundaries
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, special_pattern
from hybrid_attn.trees import check

FORMATS = ("chat", "preference")
MESSAGES, PROMPT, COMPLETION, HALVES, TOOLS = "messages", "prompt", "completion", ("chosen", "rejected"), "tools"
TRAINED = "a conversation needs a message of a role that is trained on, as --train_roles says"
Parts = list[tuple[str, bool]]  # of a text, in order, and whether each is trained on


@dataclasses.dataclass(frozen=True)
class Chat:
    """How the records of a store become documents: a form of `FORMATS`, the text of the template, and the roles to train on.

    The documents of a record have at most `max_tokens` together; None is no limit.
    """

    form: str
    template: str | None
    train_roles: tuple[str, ...]
    max_tokens: int | None = None

    @property
    def pairs(self) -> bool:
        return self.form == "preference"


class Encoded(NamedTuple):
    """A document of a conversation: its text, its tokens [n] from BOS to EOS, and its loss mask uint8 [n]."""

    text: bytes
    tokens: np.ndarray
    mask: np.ndarray


class Conversation(NamedTuple):
    """The documents of a record: one, or chosen and rejected of a pair. `text` decides which records are equal."""

    documents: tuple[Encoded, ...]
    label: str | None

    @property
    def text(self) -> bytes:
        return b"\0".join(x.text for x in self.documents)

    @property
    def sizes(self) -> list[int]:
        """The bytes of each document."""
        return [len(x.text) for x in self.documents]


class Reader:
    """Reads the documents of records; its `document` takes the role of that of `records.Fields`."""

    def __init__(self, form: Chat, label: str | None, tokenizer: ByteTokenizer | JsonTokenizer):
        self._form, self._label, self._tokenizer = form, label, tokenizer
        self._template = None if form.template is None else chat.Template(form.template, tokenizer)
        self._special = special_pattern(tokenizer)

    def document(self, record) -> Conversation:
        """The documents of a record; ValueError for one that is refused."""
        check(isinstance(record, Mapping), "it is not a record")
        label = None if self._label is None else records.field(record, self._label)
        documents = tuple(self._pair(record) if self._form.pairs else [self._conversation(record)])
        tokens, limit = sum(len(x.tokens) for x in documents), self._form.max_tokens
        what = "pair has" if self._form.pairs else "conversation has"
        check(limit is None or tokens <= limit, f"the {what} {tokens:,} tokens, and --max_tokens={limit} is the limit")
        return Conversation(documents, None if label is None else str(label))

    def _conversation(self, record: Mapping) -> Encoded:
        if MESSAGES in record:
            messages = messages_of(record[MESSAGES], MESSAGES)
            return self._encoded(self._rendered(messages, 0, record.get(TOOLS)), rendered=True)
        names = ", ".join(map(repr, record))[:500]
        known = PROMPT in record and COMPLETION in record
        check(known, f"there is no field {MESSAGES!r}, nor {PROMPT!r} and {COMPLETION!r}: the record has {names}")
        return self._completed(record, (COMPLETION,))[0]

    def _pair(self, record: Mapping) -> list[Encoded]:
        chosen, rejected = self._completed(record, HALVES)
        check(chosen.text != rejected.text, "its chosen and its rejected completion are equal")
        return [chosen, rejected]

    def _completed(self, record: Mapping, names: Sequence[str]) -> list[Encoded]:
        """The documents of a prompt with each of the completions in the fields `names`, which are trained on."""
        prompt, completions = records.field(record, PROMPT), {name: records.field(record, name) for name in names}
        if not all(isinstance(x, str) for x in (prompt, *completions.values())):
            return [self._answered(record, name) for name in names]
        for name, text in completions.items():
            check(bool(text.strip()), f"its {name!r} is empty")
        return [self._encoded([(prompt, False), (text, True)], rendered=False) for text in completions.values()]

    def _answered(self, record: Mapping, name: str) -> Encoded:
        """The document of the messages of a prompt and of those in the field `name`, which are trained on."""
        before = messages_of(record[PROMPT], PROMPT, role="user")
        after = messages_of(record[name], name, role="assistant")
        if list(after[: len(before)]) == list(before):  # many data sets repeat the prompt in the completion
            after = after[len(before) :]
        check(any(any(texts_of(x)) or x.get("tool_calls") for x in after), f"its {name!r} is empty")
        return self._encoded(self._rendered([*before, *after], len(before), record.get(TOOLS)), rendered=True)

    def _encoded(self, parts: Parts, rendered: bool) -> Encoded:
        """The document of the parts of a text. A `rendered` one has the special tokens, BOS and EOS that its template wrote."""
        text = "".join(part for part, _ in parts).encode("utf-8")
        if rendered:
            ids, starts = chat.encoded(self._tokenizer, text)
        else:
            ids, starts = self._tokenizer.encode_with_starts([text])[0]
            starts = np.append(starts, len(text))
        pieces = [(len(part.encode("utf-8")), trained) for part, trained in parts if part]
        mask = records.loss_mask(starts, pieces)[: len(ids) + 2]
        mask[0] = 0  # BOS is no target
        check(bool(mask.any()), f"no token is trained on; {TRAINED}")
        return Encoded(text, with_boundaries(self._tokenizer, ids), mask)

    def _rendered(self, messages: Sequence[Message], first: int, tools: Sequence | None) -> Parts:
        """The text of `messages` in parts, of which the turns of roles to train on, from message `first` on, are trained on."""
        check(self._template is not None, "it has messages, and there is no chat template; name one with --chat_template")
        of_tools = f"the field {TOOLS!r} is of type {type(tools).__name__}, not a list"
        check(isinstance(tools, list | None), of_tools)
        check_unspelled(self._special, [messages, tools])
        trained = [i >= first and x["role"] in self._form.train_roles for i, x in enumerate(messages)]
        roles = ", ".join(sorted({x["role"] for x in messages[first:]}))
        check(any(trained), f"no token is trained on: the roles are {roles}; {TRAINED}")
        return _Turns(self._template, messages, tools).parts(trained)


class _Turns:
    """Finds the text of each message: what its template adds to that of the messages before."""

    def __init__(self, template: chat.Template, messages: Sequence[Message], tools: Sequence | None):
        self._template, self._messages, self._tools = template, messages, tools
        self._text = self._render(messages)

    def _render(self, messages: Sequence[Message]) -> str:
        return self._template.render(messages, self._tools)

    def parts(self, trained: Sequence[bool]) -> Parts:
        """The text in parts: the `trained` turns without their headers, and what is between them."""
        parts, before, done = [], "", 0  # the text of the messages before, and the length of the parts
        for i, message in enumerate(self._messages):
            after = self._after(i, needed=trained[i])
            name = _named(i, message)
            if after in (None, before):  # a template may write a system message with the message that follows it
                check_written(self._render, self._text, self._messages, i)
                check(not trained[i], f"the chat template writes {name} with others, so its turn is unknown")
                continue
            changed = f"with {name}, the chat template changes the text of those before, so their turns are unknown"
            check(after.startswith(before), changed)
            if trained[i]:
                header = self._header(i, before, after)
                parts += [(after[done:header], False), (after[header:], True)]
                done = len(after)
            before = after
        return [*parts, (self._text[done:], False)]

    def _after(self, i: int, needed: bool) -> str | None:
        """The text of messages 0 to i. Unless it is `needed`, None where the template fails without what follows."""
        if i == len(self._messages) - 1:
            return self._text
        try:
            return self._render(self._messages[: i + 1])
        except ValueError:
            if needed:
                raise
            return None

    def _header(self, i: int, before: str, after: str) -> int:
        """Where the turn of message i begins: after the generation prompt, if the template begins the turn with it."""
        try:
            prompt = self._template.render(self._messages[:i], self._tools, generation_prompt=True)
        except ValueError:  # a template may refuse a conversation without messages
            prompt = before
        return len(prompt if after.startswith(prompt) and len(before) <= len(prompt) < len(after) else before)


def messages_of(value, name: str, role: str | None = None) -> Sequence[Message]:
    """The messages in the field `name`; with `role`, it may be one message, or the text of one of that role."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if role is not None and isinstance(value, Mapping):
        value = [value]
    check(isinstance(value, list), f"the field {name!r} is of type {type(value).__name__}, not a list of messages")
    check(bool(value), f"the field {name!r} has no message")
    for i, message in enumerate(value, 1):
        check(isinstance(message, Mapping), f"message {i} of the field {name!r} is not an object with role and content")
        has_role = isinstance(message.get("role"), str)
        check(has_role, f"message {i} of the field {name!r} has no role that is text")
        content = message.get("content")
        known = isinstance(content, str | list | None)
        check(known, f"message {i} of the field {name!r} has content of type {type(content).__name__}, not text")
    return value


def texts_of(message: Message) -> list[str]:
    """The texts of a message, without white space around them."""
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [x.get("text") for x in content or [] if isinstance(x, Mapping)]
    return [x.strip() for x in texts if isinstance(x, str) and x.strip()]


def check_written(render: Callable[[Sequence[Message]], str], rendered: str, messages: Sequence[Message], i: int) -> None:
    """ValueError if message i changes nothing in what `render` makes of the messages.

    It gets another text there, or is left out if it has none or calls tools. The text itself need not be in `rendered`:
    `tojson` escapes some characters, and some templates cut the reasoning of earlier turns.
    """
    texts = texts_of(messages[i])
    others = [{**messages[i], "content": f"{' '.join(texts)}?"}] if texts and not messages[i].get("tool_calls") else []
    try:
        written = render([*messages[:i], *others, *messages[i + 1 :]]) != rendered
    except ValueError:  # a template that fails then reads the message
        written = True
    check(written, f"the chat template leaves out {_named(i, messages[i])}")


def _named(i: int, message: Message) -> str:
    return f"message {i + 1}, of the role {message['role']!r}"


def check_unspelled(special: re.Pattern, values) -> None:
    """ValueError where a text in `values` spells a special token, which `special` matches."""
    for text in _strings(values):
        spelled = special.search(text)
        problem = f"a message spells {spelled and spelled[0]!r}, which is a special token"
        check(not spelled, f"{problem}; only the template may write one")


def _strings(value) -> Iterator[str]:
    """The texts in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for x in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _strings(x)
