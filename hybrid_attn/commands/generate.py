"""Answers prompts with the model of a checkpoint: python tools/generate.py --checkpoint=runs/hybrid_8k --prompt='def main('

--checkpoint is a run's workdir, or a directory of checkpoints such as tools/import_hf.py writes. The answer to --prompt is
streamed to stdout. --prompts=FILE has JSON lines {"prompt": ..., "question": ...}, of which the question is optional, or
{"messages": [{"role": "user", "content": ...}]}, which a chat template writes as text. The same lines with "answer", "tokens"
and "logprob" (the sum over the answer's tokens) go to --out, or to stdout. Speed and the bytes of the cache go to stderr. Exit
status: 2 for wrong flags and inputs; 1 for logits that are not finite and for a full disk, where the answers go to stdout
instead; 130 after Ctrl-C.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from absl import flags

from hybrid_attn import compiled, files, programs
from hybrid_attn.characters import is_utf8
from hybrid_attn.infer import loading, prompts
from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import DEFAULT_CHUNK, Engine, EngineOptions, Timing
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.text import Answer, AnswerOptions, answers
from hybrid_attn.parallel.mesh import AXES, mesh_over_first
from hybrid_attn.trees import check

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
PROMPTS = flags.DEFINE_string("prompts", None, "File of JSON lines, one prompt each.")
QUESTION = flags.DEFINE_string("question", None, "Question that follows every prompt, after its cache is compressed.")
BOS = flags.DEFINE_bool("bos", True, "Put BOS before each prompt.")
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "File with the Jinja template that writes messages as text; by default that of the conversations of the training, or the "
    "tokenizer's.",
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "The most tokens of an answer.", 1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", None, "Sample from this many of the most likely tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Sample from the fewest tokens that have this probability together.")
MIN_P = flags.DEFINE_float("min_p", None, "Sample from tokens of at least this share of the largest probability.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first prompt; each further prompt has the next seed.", 0, 2**32 - 1)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer and is no part of it; may be repeated.")
CHUNK = flags.DEFINE_integer("chunk", DEFAULT_CHUNK, "Tokens of a prompt that are read at a time.", 1)
CAPACITY = flags.DEFINE_integer("capacity", None, "The most tokens of a prompt and its answer; longer ones are refused.", 1)
CACHE = flags.DEFINE_enum(
    "cache", "auto", ("auto", "int8"), "Numbers of the KV cache of layers whose queries see all earlier tokens."
)
COMPRESS = flags.DEFINE_string("compress", None, "How their cache of a prompt is compressed, as snapkv:cap=1024,window=64.")
MESH = flags.DEFINE_string("mesh", "", "Devices on each axis, as context=4,tensor=2; by default one device.")
OUT = flags.DEFINE_string("out", None, "File of JSON lines to write.")


def compression(text: str) -> Compression:
    """The compression that --compress describes, as "snapkv:cap=1024,window=64"."""
    method, _, options = text.partition(":")
    types = {field.name: field.type for field in dataclasses.fields(Compression) if field.name != "method"}
    values = programs.pairs(f"--compress={text}", options, types)
    check("cap" in values, f"--compress={text} has no cap; say how many slots a head keeps, as {method}:cap=1024")
    return Compression(method, **values)


def records() -> dict[str, dict]:
    """A record with a prompt or messages for each answer, by its origin, and a question in all of them or in none."""
    check((PROMPT.value is None) != (PROMPTS.value is None), "give either --prompt=TEXT or --prompts=FILE")
    for flag in (PROMPT, QUESTION):
        check(is_utf8(flag.value or ""), f"--{flag.name} is not UTF-8; put the text into a file of --prompts")
    read = {"--prompt": {prompts.PROMPT: PROMPT.value}} if PROMPT.value is not None else prompts.read(PROMPTS.value)
    if QUESTION.value is not None:
        for where, x in read.items():
            check(prompts.PROMPT in x, f"--question follows prompts, and {where} has messages; make it the last of them")
            x.setdefault(prompts.QUESTION, QUESTION.value)
    without = [where for where, x in read.items() if prompts.QUESTION not in x]
    messages = next((where for where in without if prompts.MESSAGES in read[where]), None)
    cure = "give --question for those" if messages is None else f"{messages} has messages, so answer it from a file of its own"
    all_or_none = len(without) in (0, len(read))
    check(all_or_none, f"{PROMPTS.value}: some lines have a question and others have none; {cure}")
    return read


def writable_out() -> Path | None:
    """The file of --out, links resolved; OSError if it cannot be written. Its content stays until the answers are complete."""
    if OUT.value is None:
        return None
    files.check_named("out", OUT.value, "a file")
    path = Path(os.path.realpath(OUT.value))
    new = not path.exists()
    with files.naming(OUT.value):
        path.open("ab").close()
    if new:
        path.unlink()
    return path


def write(read: Iterable[dict], replies: Sequence[Answer], path: Path | None) -> None:
    """Writes the records with their answers as JSON lines: to the file of --out, or to stdout if there is none or it fails."""
    lines = []
    for record, reply in zip(read, replies, strict=True):
        numbers = {"tokens": len(reply.tokens), "logprob": float(reply.logprobs.sum())}
        lines.append(prompts.json_line(record | {"answer": reply.text} | numbers))
    if path is None:
        sys.stdout.writelines(lines)
        return
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
        f"first token  after {timing.first_token_s:.2f} s, besides {timing.compile_s:.1f} s of compiling\n"
        f"prefill      {rate(timing.prompt_tokens, timing.prefill_s)}\n"
        f"decode       {rate(timing.new_tokens, timing.decode_s)}\n"
        f"cache        {timing.cache_bytes / 2**20:,.2f} MiB"
    )


def generate() -> None:
    compiled.keep()
    read = records()
    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value)
    compress = None if COMPRESS.value is None else compression(COMPRESS.value)
    out = writable_out()
    directory = loading.find(CHECKPOINT.value)
    step = loading.step_of(directory, STEP.value)
    mesh = mesh_over_first(**programs.pairs(f"--mesh={MESH.value}", MESH.value, dict.fromkeys(AXES, int)))
    shown = []

    def show(_, piece: str) -> None:
        if piece:
            shown.append(piece)
            print(piece, end="", flush=True)

    with jax.set_mesh(mesh):
        form = prompts.format_of(directory, step, CHAT_TEMPLATE.value, BOS.value)
        requests = form.requests.prompts(read)
        options = AnswerOptions(
            GenerateOptions(sampling, form.stop_tokens, compress),
            stops=[*STOP.value, *form.stops],
            seeds=[(SEED.value + i) % 2**32 for i in range(len(read))],
            questions=[x[prompts.QUESTION] for x in read.values() if prompts.QUESTION in x] or None,
            bos=BOS.value,
        )
        sizes = EngineOptions(CHUNK.value, CACHE.value, CAPACITY.value)
        sizes.on(mesh)  # ValueError before the parameters are read
        c, params, tokenizer = loading.load(directory, step)
        engine = Engine(params, c, sizes)
        on_text = show if PROMPT.value is not None else None
        try:
            replies = answers(engine, tokenizer, requests, MAX_NEW_TOKENS.value, options, on_text)
        except FloatingPointError as cause:
            raise FloatingPointError(f"{loading.name_of(directory, step)}: {cause}") from cause
        finally:
            if shown:
                print(flush=True)  # ends the line, whatever interrupts the answer
    if PROMPTS.value or out:
        write(read.values(), replies, out)
    print(report(engine.timing), file=sys.stderr)


def main(argv):
    programs.run(generate, argv, f"these prompts and {MAX_NEW_TOKENS.value:,} new tokens")


start = functools.partial(programs.start, main, __name__)  # the console script
