"""Prompts: records of a file with text or with messages, and the tokens of a conversation that a model is to continue.

{"prompt": "def main(", "question": "What is missing?"}                       the question is optional
{"messages": [{"role": "user", "content": "What is 2 + 2?"}], "tools": []}    the tools are optional
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybrid_attn import files
from hybrid_attn.data import chat, conversations
from hybrid_attn.data.chat import Message
from hybrid_attn.data.conversations import MESSAGES, PROMPT, TOOLS
from hybrid_attn.data.tokenizer import ByteTokenizer, JsonTokenizer, special_pattern
from hybrid_attn.infer import loading
from hybrid_attn.trees import check

QUESTION = "question"
MARK = "¿mark?"  # a text that no template has of its own
NO_TEMPLATE = (
    "there is no chat template; put a chat_template.jinja beside the tokenizer.json (or, to chat and generate, name one with "
    "--chat_template)"
)


def read(path: str) -> dict[str, dict]:
    """The records of the JSON lines of a file, by file and line; ValueError names the line that is none."""
    with open(path, "rb") as file:
        lines = {f"{path}:{number}": line for number, line in enumerate(file, 1) if line.strip()}
    check(bool(lines), f'{path} has no lines; write one {{"prompt": ...}} or {{"messages": ...}} for each answer')
    return {where: record(line, where) for where, line in lines.items()}


def record(line: bytes, where: str) -> dict:
    """The record of a JSON line; ValueError if it is not one, or cannot be written again with an answer."""
    values = files.object_of(line, where)
    one = (PROMPT in values) != (MESSAGES in values)
    check(one, f'{where} has {"both" if PROMPT in values else "neither"} of "{PROMPT}" and "{MESSAGES}"; give one of them')
    if MESSAGES in values:
        _check_messages(values, where)
    else:
        check(isinstance(values[PROMPT], str) and values[PROMPT] != "", f'{where} has no text under "{PROMPT}"')
    check(isinstance(values.get(QUESTION, ""), str), f'{where} has something else than text under "{QUESTION}"')
    try:
        json_line(values).encode()
    except ValueError as cause:
        raise ValueError(f"{where} has a value that JSON in UTF-8 cannot hold: {cause}") from cause
    return values


def _check_messages(values: Mapping, where: str) -> None:
    check(QUESTION not in values, f'{where} has a "{QUESTION}" beside messages; make it the last message')
    try:
        check_request(conversations.messages_of(values[MESSAGES], MESSAGES), values.get(TOOLS))
    except ValueError as cause:
        raise ValueError(f"{where}: {cause}") from cause


def check_request(messages: Sequence[Message], tools: object) -> None:
    """ValueError unless the last message can be answered."""
    last, listed = messages[-1], isinstance(tools, list | None)
    check(listed, f"the field {TOOLS!r} is of type {type(tools).__name__}, not a list")
    check(last["role"] != "assistant", "the last message is the assistant's; end with one that it is to answer")
    check(bool(conversations.texts_of(last)), f"the last message, of the role {last['role']!r}, has no text")


def json_line(values: dict) -> str:
    """ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


class Requests:
    """Conversations as tokens, by the text of a chat template; without one, messages are a ValueError."""

    def __init__(self, tokenizer: ByteTokenizer | JsonTokenizer, template: str | None, bos: bool = True):
        self._tokenizer, self._bos = tokenizer, [tokenizer.bos] * bos
        self._template = None if template is None else chat.Template(template, tokenizer)
        self._special = special_pattern(tokenizer)

    def prompts(self, records: Mapping[str, Mapping]) -> list[str | list[int]]:
        """The prompt of each record: its text, or the tokens of its messages; ValueError with the name of one that has none."""
        made = []
        for where, x in records.items():
            try:
                made.append(x[PROMPT] if PROMPT in x else self.ids(x[MESSAGES], x.get(TOOLS)))
            except ValueError as cause:
                raise ValueError(f"{where}: {cause}") from cause
        return made

    def ids(self, messages: Sequence[Message], tools: Sequence | None = None) -> list[int]:
        """BOS, the messages and the header of the assistant's turn; ValueError where the template fails or leaves one out."""
        check(self._template is not None, NO_TEMPLATE)
        conversations.check_unspelled(self._special, [messages, tools])
        render = functools.partial(self._template.render, tools=tools, generation_prompt=True)
        text = render(messages)
        for i in range(len(messages)):
            conversations.check_written(render, text, messages, i)
        ids = self._tokenizer.encode_rendered(text.encode())[0].tolist()
        return self._bos + ids[ids[:1] == [self._tokenizer.bos] :]

    def ends(self) -> list[int]:
        """The special token that ends a turn of the assistant, or else begins the user's next one, if there is one."""
        for text in (self._behind_answer(), self._behind_answer(MARK)):
            ids = self._tokenizer.encode_rendered(text.encode())[0].tolist()
            special = [i for i in ids if i in self._tokenizer.special_tokens.values()]
            if special:
                return special[:1]
        return []

    def end_texts(self) -> list[str]:
        """What the template writes between an answer and the user's next message, if no special token ends the answer."""
        text = self._behind_answer(MARK)
        return [text] if text.strip() and not self.ends() else []

    def _behind_answer(self, *more: str) -> str:
        """What the template writes behind an answer, up to a message of the user with the text `more`; "" where it fails."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        messages += [{"role": "user", "content": x} for x in more]
        try:
            parts = [] if self._template is None else self._template.render(messages).split(MARK)
        except ValueError:  # a template may want more messages, such as a system message
            return ""
        return parts[1] if len(parts) == len(messages) else ""


class Format(NamedTuple):
    """How a checkpoint is asked: its tokenizer, requests in its tokens, and the ids and the texts that end an answer."""

    tokenizer: ByteTokenizer | JsonTokenizer
    requests: Requests
    stop_tokens: Sequence[int]
    stops: Sequence[str]


def format_of(directory: str, step: int, template_file: str | None = None, bos: bool = True) -> Format:
    """The format of a checkpoint, by the chat template of `template_file`, or else its own."""
    tokenizer = loading.described(directory, step).tokenizer
    requests = Requests(tokenizer, loading.chat_template(directory, step, template_file), bos)
    stop_tokens = sorted({*loading.stop_tokens(directory, tokenizer), *requests.ends()})
    return Format(tokenizer, requests, stop_tokens, requests.end_texts())
