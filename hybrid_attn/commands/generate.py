"""Answers prompts with the model of a checkpoint: python tools/generate.py --checkpoint=runs/hybrid_8k --prompt='def main('

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes. The answer to --prompt goes to
stdout as it comes. --prompts=FILE has JSON lines {"prompt": ..., "question": ...}, the question where one is asked; the same
lines with "answer", "tokens" and "logprob" (the answer's, summed over its tokens) go to --out, or to stdout. Speed and the
bytes of the cache go to stderr. Exit status: 2 for what cannot be answered; 1 for logits that are not numbers and for a disk
that is full, where the answers go to stdout instead; 130 after Ctrl-C.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
from absl import flags

from hybrid_attn import files, programs
from hybrid_attn.infer import loading
from hybrid_attn.infer.compress import Compression
from hybrid_attn.infer.engine import TOKENS_AT_ONCE, Engine, Timing
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.text import Answer, answers
from hybrid_attn.parallel.mesh import AXES, mesh_over_first

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which of them; by default the newest.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to go on from.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of JSON lines with a prompt each.")
QUESTION = flags.DEFINE_string("question", None, "Follows every prompt, after its cache is compressed.")
BOS = flags.DEFINE_bool("bos", True, "Begin each prompt with the token that begins a document.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Most tokens of an answer.", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of sampling; at 0 the likeliest token is taken.")
TOP_K = flags.DEFINE_integer("top_k", None, "Draw from so many of the likeliest tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Draw from the fewest tokens that have this probability together.")
MIN_P = flags.DEFINE_float("min_p", None, "Draw from tokens of at least this share of the largest probability.")
SEED = flags.DEFINE_integer("seed", 0, "Of the first prompt; each further one has the next.", 0, 2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer and is no part of it; may be given again.")
CHUNK = flags.DEFINE_integer("chunk", TOKENS_AT_ONCE, "Tokens of a prompt that are read at a time.", 1)
CAPACITY = flags.DEFINE_integer("capacity", None, "Most tokens of a prompt and its answer; longer ones are refused.", 1)
CACHE = flags.DEFINE_enum("cache", "auto", ("auto", "int8"), "How layers that see the whole prefix keep keys and values.")
COMPRESS = flags.DEFINE_string("compress", None, "What they keep of a prompt: snapkv:cap=1024,window=64 and the like.")
MESH = flags.DEFINE_string("mesh", "", "Devices along each axis, as context=4,tensor=2; by default one device.")
OUT = flags.DEFINE_string("out", None, "File of JSON lines to write.")


def compression(text: str) -> Compression:
    """The compression called "snapkv:cap=1024,window=64"."""
    method, _, options = text.partition(":")
    types = {field.name: field.type for field in dataclasses.fields(Compression) if field.name != "method"}
    found = programs.pairs(f"--compress={text}", options, types)
    if "cap" not in found:
        raise ValueError(f"--compress={text} has no cap; say how many slots a head keeps, as {method}:cap=1024")
    return Compression(method, **found)


def records() -> list[dict]:
    """A record with a prompt for each answer wanted, and a question in each or in none."""
    if (PROMPT.value is None) == (PROMPTS.value is None):
        raise ValueError("give either --prompt=TEXT or --prompts=FILE")
    for flag in (PROMPT, QUESTION):
        if flag.value is not None and not _encodes(flag.value):
            raise ValueError(f"--{flag.name} is not UTF-8; put the text into a file of --prompts")
    if PROMPT.value is not None:
        found = [{"prompt": PROMPT.value}]
    else:
        with open(PROMPTS.value, "rb") as file:
            found = [record(line, number) for number, line in enumerate(file, 1) if line.strip()]
        if not found:
            raise ValueError(f'{PROMPTS.value} has no lines; write one {{"prompt": ...}} for each answer')
    if QUESTION.value is not None:
        found = [x | {"question": x.get("question", QUESTION.value)} for x in found]
    if 0 < sum("question" in x for x in found) < len(found):
        raise ValueError(f"{PROMPTS.value}: some lines have a question and others have none; give --question for those")
    return found


def record(line: bytes, number: int) -> dict:
    """The record of a JSON line; ValueError if it is none, or cannot be written again with an answer."""
    try:
        found = json.loads(line)
    except RecursionError as cause:
        raise ValueError(f"{PROMPTS.value}:{number} is nested too deeply to be read") from cause
    except ValueError as cause:
        raise ValueError(f"{PROMPTS.value}:{number} is not JSON: {cause}") from cause
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{PROMPTS.value}:{number} has no text under "prompt"')
    if not isinstance(found.get("question", ""), str):
        raise ValueError(f'{PROMPTS.value}:{number} has something else than text under "question"')
    try:
        json_line(found).encode()
    except ValueError as cause:
        raise ValueError(f"{PROMPTS.value}:{number} has a value that JSON in UTF-8 cannot hold: {cause}") from cause
    return found


def _encodes(text: str) -> bool:
    """Whether UTF-8 can hold a text: no half of a surrogate pair, such as Python makes of other bytes in arguments."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def json_line(values: dict) -> str:
    """ValueError for NaN and infinity, which JSON does not know."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def shown():
    """Gives what prints the pieces of an answer; whatever ends them, it ends the line."""
    begun = False

    def show(_, piece: str) -> None:
        nonlocal begun
        begun = True
        print(piece, end="", flush=True)

    try:
        yield show
    finally:
        if begun:
            print(flush=True)


@contextlib.contextmanager
def failures_of(checkpoint: str):
    """Has a FloatingPointError of the body name the checkpoint."""
    try:
        yield
    except FloatingPointError as cause:
        raise FloatingPointError(f"{checkpoint}: {cause}") from cause


def out_path() -> Path:
    """The file that --out names, or the one that it is a link to, whether that is there or not."""
    files.check_named("out", OUT.value, "a file")
    return Path(os.path.realpath(OUT.value))


def check_out() -> None:
    """OSError if --out cannot be written: better now than after hours. What is there stays until the answers are."""
    path = out_path()
    new = not path.exists()
    with files.naming(OUT.value):
        path.open("ab").close()
    if new:
        path.unlink()


def write(found: list[dict], replies: list[Answer]) -> None:
    """The records with their answers, a JSON line each: to --out, or to stdout where there is none or it cannot be written."""
    lines = []
    for old, reply in zip(found, replies, strict=True):
        numbers = {"tokens": len(reply.tokens), "logprob": float(reply.logprobs.sum())}
        lines.append(json_line(old | {"answer": reply.text} | numbers))
    if OUT.value is None:
        sys.stdout.writelines(lines)
        return
    path = out_path()
    try:
        if path.exists() and not path.is_file():  # a pipe or a terminal
            path.write_text("".join(lines), encoding="utf-8")
        else:
            files.write_atomically(path, "".join(lines))
    except OSError as cause:
        sys.stdout.writelines(lines)
        raise OSError(f"{OUT.value} could not be written ({cause.strerror}); the answers are on stdout instead") from cause


def report(timing: Timing) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"

    return (
        f"first token  after {timing.first_token_s:.2f} s, beside {timing.compile_s:.1f} s in which programs were compiled\n"
        f"prefill      {rate(timing.prompt_tokens, timing.prefill_s)}\n"
        f"decode       {rate(timing.new_tokens, timing.decode_s)}\n"
        f"cache        {timing.cache_bytes / 2**20:,.2f} MiB"
    )


def generate() -> None:
    found = records()
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    chosen = None if COMPRESS.value is None else compression(COMPRESS.value)
    if OUT.value is not None:
        check_out()
    directory = loading.find(CHECKPOINT.value)
    step = loading.step_of(directory, STEP.value)
    mesh = mesh_over_first(**programs.pairs(f"--mesh={MESH.value}", MESH.value, dict.fromkeys(AXES, int)))
    with jax.set_mesh(mesh), shown() as show, failures_of(f"the checkpoint of step {step} in {directory}"):
        c, params, tokenizer = loading.load(directory, step)
        engine = Engine(params, c, chunk=CHUNK.value, cache=CACHE.value, capacity=CAPACITY.value)
        replies = answers(
            engine, tokenizer, [x["prompt"] for x in found], MAX_NEW_TOKENS.value, sampling=sampling,
            seeds=[(SEED.value + row) % 2**32 for row in range(len(found))], stops=STOP.value,
            stop_tokens=loading.stop_tokens(directory, tokenizer), compression=chosen, bos=BOS.value,
            questions=[x["question"] for x in found] if "question" in found[0] else None,
            on_text=show if PROMPT.value is not None else None,
        )  # fmt: skip
    if PROMPTS.value or OUT.value:
        write(found, replies)
    print(report(engine.timing), file=sys.stderr)


def main(argv):
    programs.run(generate, argv, f"these prompts and {MAX_NEW_TOKENS.value:,} new tokens")


def start() -> None:
    """The console script."""
    programs.start(main, __name__)
