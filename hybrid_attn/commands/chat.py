"""Chats with the model of a checkpoint in a terminal: python tools/chat.py --checkpoint=runs/sft

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes. Each line of stdin is a
message. The reply is streamed to stdout; how many tokens the conversation has, of how many, goes to stderr. /reset begins a new
conversation, /help lists the commands, /exit or the end of the input (Ctrl-D) ends the program. Ctrl-C stops a reply that has
begun, which stays in the conversation; a second one, or one at another time, ends the program. Exit status: 2 for wrong flags
and inputs; 1 for logits that are not finite; 130 after Ctrl-C.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator

import jax
from absl import flags

from hybrid_attn import compiled, programs
from hybrid_attn.characters import is_utf8, visible
from hybrid_attn.infer import loading, prompts
from hybrid_attn.infer.engine import EngineOptions
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.session import Session
from hybrid_attn.infer.text import AnswerOptions, answers
from hybrid_attn.parallel.mesh import AXES, mesh_over_first
from hybrid_attn.trees import check

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
SYSTEM = flags.DEFINE_string("system", None, "Text of a system message, with which every conversation begins.")
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "File with the Jinja template that writes messages as text; by default that of the conversations of the training, or the "
    "tokenizer's.",
)
CONTEXT = flags.DEFINE_integer("context", None, "The most tokens of a conversation; by default the length of the training.", 2)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 1024, "The most tokens of a reply.", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample from this many of the most likely tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample from the fewest tokens that have this probability together.")
MIN_P = flags.DEFINE_float("min_p", None, "Sample from tokens of at least this share of the largest probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first reply; each further reply has the next seed.", 0, 2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a reply and is no part of it; may be repeated.")
CHUNK = flags.DEFINE_integer("chunk", 256, "Tokens of a message that are read at a time.", 1)
CACHE = flags.DEFINE_enum(
    "cache", "auto", ("auto", "int8"), "Numbers of the KV cache of layers whose queries see all earlier tokens."
)
MESH = flags.DEFINE_string("mesh", "", "Devices on each axis, as tensor=2; by default one device.")

SLICE = 4  # tokens that are decoded before they are shown
PROBE = "?"  # a message that shows at the start whether the template writes the conversation
RESET, HELP, EXIT = "/reset", "/help", "/exit"
COMMANDS = f"{RESET} begins a new conversation, {EXIT} or Ctrl-D ends the program, Ctrl-C stops a reply"


class Conversation:
    """The messages so far, at most `context` tokens; `limit` names the flag or default that sets this."""

    def __init__(self, requests: prompts.Requests, system: str | None, context: int, limit: str):
        self._requests, self.context, self.limit = requests, context, limit
        check(is_utf8(system or ""), "--system is not UTF-8")
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self._messages, self.tokens = list(self._first), 0

    def with_message(self, text: str) -> list[int]:
        """The tokens of the conversation with this message at its end. `add` stores it with its reply."""
        check(is_utf8(text), "the message is not UTF-8")
        ids = self._requests.ids([*self._messages, {"role": "user", "content": text}])
        cure = f"{RESET} begins a new one, and " if self._messages != self._first else ""
        sizes = f"the conversation would have {len(ids):,} of {self.context:,} tokens"
        check(len(ids) < self.context, f"{sizes}; {cure}a larger --context allows more")
        return ids

    def add(self, text: str, reply: str, tokens: int) -> None:
        """A message and its reply, after which there are so many `tokens`."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        self.tokens = tokens

    @property
    def fill(self) -> str:
        return f"{self.tokens:,} of {self.context:,} tokens"


class Chat:
    """Replies to messages with a session; `options` are those of every reply."""

    def __init__(self, session: Session, tokenizer: loading.Tokenizer, conversation: Conversation, options: AnswerOptions):
        self._session, self._tokenizer, self._conversation = session, tokenizer, conversation
        self._options, self._replies = options, 0

    def take(self, line: str) -> None:
        """Does what a line says. A message that cannot be answered is an error on stderr."""
        if line == RESET:
            self._conversation.reset()
            tell("a new conversation")
        elif line == HELP:
            tell(COMMANDS)
        elif line:
            try:
                ids = self._conversation.with_message(line)
            except ValueError as error:
                tell(f"error: {programs.one_line(str(error))}")
            else:
                self._reply(line, ids)

    def _reply(self, line: str, ids: list[int]) -> None:
        most = min(MAX_NEW_TOKENS.value, self._conversation.context - len(ids))
        options = dataclasses.replace(self._options, seeds=[(SEED.value + self._replies) % 2**32])
        try:
            with programs.Interrupt() as interrupt:
                show = functools.partial(shown, interrupt)
                (answer,) = answers(self._session, self._tokenizer, [ids], most, options, show)
        finally:
            print(flush=True)  # ends the line, whatever interrupts the reply
        self._replies += 1
        self._conversation.add(line, answer.text, len(ids) + len(answer.tokens))
        is_cut = len(answer.tokens) == most and answer.tokens[-1] not in options.generate.stop_tokens
        limit = "--max_new_tokens" if most == MAX_NEW_TOKENS.value else "--context"
        tell(f"[{self._conversation.fill}{f'; {limit} cuts the reply' if is_cut else ''}]")


def shown(interrupt: programs.Interrupt, _, piece: str) -> bool:
    """Prints a piece of a reply; True where the user wants no more. Before the first piece, Ctrl-C ends the program."""
    interrupt.begin()
    print(piece, end="", flush=True)
    return interrupt.requested


def tell(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)


def lines() -> Iterator[str]:
    """The lines of stdin up to its end or /exit; a terminal shows a prompt, and remembers lines."""
    sys.stdin.reconfigure(errors="surrogateescape")  # so that a line which is not UTF-8 ends nothing
    prompt = ""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # of which input() makes use
        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print(end="\n" if prompt else "")
            return
        if line == EXIT:
            return
        yield line


def chat() -> None:
    compiled.keep()
    directory = loading.find(CHECKPOINT.value)
    step = loading.step_of(directory, STEP.value)
    name = loading.name_of(directory, step)
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    mesh = mesh_over_first(**programs.pairs(f"--mesh={MESH.value}", MESH.value, dict.fromkeys(AXES, int)))
    with jax.set_mesh(mesh):
        form = prompts.format_of(directory, step, CHAT_TEMPLATE.value)
        conversation = Conversation(form.requests, SYSTEM.value, *context_of(directory, step))
        conversation.with_message(PROBE)  # ValueError where the template refuses the system message, or leaves messages out
        spelled = form.tokenizer.special_tokens  # no message may spell one, so a reply ends before it
        options = AnswerOptions(GenerateOptions(sampling, form.stop_tokens), [*STOP.value, *form.stops, *spelled])
        sizes = EngineOptions(CHUNK.value, CACHE.value, slice=SLICE)
        sizes.on(mesh)  # ValueError before the parameters are read
        c, params, _ = loading.load(directory, step)
        talk = Chat(Session(params, c, sizes), form.tokenizer, conversation, options)
        tell(f"{name}, with a context of {conversation.context:,} tokens ({conversation.limit}); {HELP} lists the commands")
        try:
            for line in lines():
                talk.take(line)
        except FloatingPointError as cause:
            raise FloatingPointError(f"{name}: {cause}") from cause


def context_of(directory: str, step: int) -> tuple[int, str]:
    """The most tokens of a conversation, and what says so."""
    if CONTEXT.value is not None:
        return CONTEXT.value, "--context"
    return loading.trained_length_of(directory, step)


def main(argv):
    programs.run(chat, argv, "this conversation; use a smaller --context or --cache=int8")


start = functools.partial(programs.start, main, __name__)  # the console script
