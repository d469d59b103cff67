"""Prompts in, answers out: chunks of prompts are read into caches, then each row goes on token by token.

One compiled program reads every chunk, another decodes in one loop with a stop for each row. Prompts of like length share a
batch; what all of them begin with is read once.

Letters: B rows, T tokens of a chunk, D model, V vocabulary.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import CheckpointConfig
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.cache import Cache, Compression, compressed
from hybrid_attn.infer.sampling import GREEDY, Sampling
from hybrid_attn.infer.steps import SLICE, Program, decode, read, score
from hybrid_attn.model import run_on
from hybrid_attn.model.extend import unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, place

SEED = 0  # of what a compression draws at random
TOKENS_AT_ONCE = 2048  # of a prompt, where nobody says another chunk
ROWS_AT_ONCE = 8  # or as many as a batch has shards
LEAST_CHUNK = 16
WEIGHTS = jax.jit(unstacked, static_argnums=(0, 2))


class Generated(NamedTuple):
    """An answer: int32 tokens, the stop token included, and the log-probability that the model gave to each."""

    tokens: np.ndarray
    logprobs: np.ndarray


class Timing(NamedTuple):
    """Of the last call. Seconds are those of running; compiling, which happens once for each size, is apart.

    `first_token_s` is until the rows of the first batch had a token, `cache_bytes` the largest batch's.
    """

    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    prefill_s: float
    decode_s: float
    compile_s: float
    cache_bytes: int


class Engine:
    """Generates and scores with `params` (as `model.init` makes them) on the mesh in force when it is made and used.

    `chunk` tokens of each prompt are read at a time; `cache` is "auto" (the dtype of the run) or "int8" for the layers that
    see the whole prefix; `capacity` is the most tokens of a row, prompt and answer together (None: what memory allows);
    `rows` is the most rows of a batch (None: `ROWS_AT_ONCE`, or as many as its shards need); `programs` is a dict, which
    engines on one mesh may share, of what they have compiled. Several processes make the same calls and get the same answers.
    """

    def __init__(
        self,
        params: dict,
        config: CheckpointConfig,
        *,
        chunk: int = TOKENS_AT_ONCE,
        cache: str = "auto",
        capacity: int | None = None,
        rows: int | None = None,
        programs: dict | None = None,
    ):
        self.mesh = jax.sharding.get_mesh()
        context, shards = self.mesh.shape["context"], math.prod(self.mesh.shape[axis] for axis in BATCH)
        if cache not in ("auto", "int8"):
            raise ValueError(f"cache={cache!r} is not one of 'auto', 'int8'")
        if chunk < 1 or chunk % context:
            raise ValueError(f"chunk={chunk} does not split over {context} context shards; use a multiple of {context}")
        rows = -(-ROWS_AT_ONCE // shards) * shards if rows is None else rows
        if rows < 1 or rows % shards:
            raise ValueError(f"rows={rows} does not split over {shards} shards of the batch; use a multiple of {shards}")
        self.model, self.chunk, self.capacity, self.rows, self.quantised = config.model, chunk, capacity, rows, cache == "int8"
        self.run = run_on(self.mesh.devices.flat[0].platform, config.model, config.train)
        self.weights = WEIGHTS(config.model, params, self.run.dtype)
        self._programs: dict[tuple, Callable] = {} if programs is None else programs
        self.timing = Timing(0, 0, 0.0, 0.0, 0.0, 0.0, 0)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        stop_tokens: Sequence[int] = (),
        compression: Compression | None = None,
        questions: Sequence[Sequence[int]] | None = None,
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
    ) -> list[Generated]:
        """An answer to each prompt, at most `max_new_tokens` long, ended by a stop token if one comes.

        With `compression`, layers that see the whole prefix keep part of each prompt; `questions` follow the prompts, and
        are read after that.

        `seeds` (0, 1, ... by default) make a row's answer the same in any batch. `on_tokens(row, ids)` is called as tokens
        come; True ends the row. ValueError for a prompt that is empty, has a token out of the vocabulary, or does not fit;
        FloatingPointError where a logit is not a number.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        _check_options(max_new_tokens, len(prompts), seeds, stop_tokens, questions)
        if compression is not None and (self.mesh.shape["context"] > 1 or self.mesh.is_multi_process):
            raise NotImplementedError("compression needs every slot on one device of one process; use a mesh with context=1")
        if not prompts:
            return []
        asked = self._asked(prompts, questions, max_new_tokens, compression)
        self.timing = Timing(sum(len(prompt) + len(question) for prompt, question in asked), 0, 0.0, 0.0, 0.0, 0.0, 0)
        answers: dict[int, Generated] = {}
        for which, cache, last_BD, program in self._read_in_batches(asked, max_new_tokens, compression):
            found = self._decode(program, cache, last_BD, which, seeds, max_new_tokens, sampling, stop_tokens, on_tokens)
            answers |= dict(zip(which, found, strict=True))
        return [answers[row] for row in range(len(asked))]

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token of each continuation after its prompt, float32; no array of all logits exists.

        FloatingPointError where one is not a number.
        """
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(continuations)} continuations were given for {len(prompts)} prompts")
        whole = [[*prompt, *more] for prompt, more in zip(self._checked(prompts, 0), continuations, strict=True)]
        rows = self._checked(whole, 0)
        scores: dict[int, np.ndarray] = {}
        for which in self._batches(rows):
            inputs = [rows[row][:-1] for row in which]
            found = self._losses([rows[row] for row in which], inputs, [len(prompts[row]) for row in which])
            for row, logprobs in zip(which, found, strict=True):
                _check_finite(row, len(prompts[row]), logprobs)
            scores |= dict(zip(which, found, strict=True))
        return [scores[row] for row in range(len(rows))]

    def _asked(self, prompts, questions, new: int, compression: Compression | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each prompt with what is read after its cache is compressed."""
        nothing = np.zeros(0, np.int32)
        if questions is None:
            return [(prompt, nothing) for prompt in self._checked(prompts, new)]
        both = self._checked([[*prompt, *question] for prompt, question in zip(prompts, questions, strict=True)], new)
        if compression is None:
            return [(prompt, nothing) for prompt in both]
        return [(row[: len(prompt)], row[len(prompt) :]) for row, prompt in zip(both, self._checked(prompts, 0), strict=True)]

    def _checked(self, prompts: Sequence[Sequence[int]], new: int) -> list[np.ndarray]:
        rows = [np.asarray(prompt).reshape(-1) for prompt in prompts]
        for i, row in enumerate(rows):
            if len(row) and not np.issubdtype(row.dtype, np.integer):
                raise ValueError(f"prompt {i} is not of token ids, which are integers: {row[:3].tolist()}...")
            if not len(row):
                raise ValueError(f"prompt {i} is empty; give it at least one token, such as the one that begins a document")
            if row.min() < 0 or row.max() >= self.model.vocab_size:
                wrong = next(int(x) for x in row if not 0 <= x < self.model.vocab_size)
                raise ValueError(f"prompt {i}: token {wrong} is not in the vocabulary of {self.model.vocab_size}")
            if self.capacity is not None and len(row) + new > self.capacity:
                answer = f" and {new} new tokens" if new else ""
                raise ValueError(
                    f"prompt {i}: {len(row)} tokens{answer} do not fit the capacity of {self.capacity}; shorten it, or make "
                    f"the engine with capacity={caches.power_of_two(len(row) + new)}"
                )
        return [row.astype(np.int32) for row in rows]

    def _batches(self, rows: list[np.ndarray]) -> list[list[int]]:
        """Numbers of rows of like length, longest first."""
        order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
        return [order[i : i + self.rows] for i in range(0, len(order), self.rows)]

    def _sizes(self, most: int, longest: int, least: int = 1) -> tuple[Program, int, int]:
        """The program, the chunk and the capacity for rows that reach `most` tokens, `longest` of them read in chunks.

        A chunk has `least` tokens or more.
        """
        context = self.mesh.shape["context"]
        chunk = min(self.chunk, context * caches.power_of_two(max(-(-longest // context), LEAST_CHUNK)))
        chunk = max(chunk, caches.power_of_two(least))
        capacity = chunk * caches.power_of_two(-(-most // chunk))
        return Program(self.model, self.run, chunk // context), chunk, capacity

    def _padded(self, count: int) -> int:
        """Rows of the batch that `count` rows are read in."""
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH)
        return min(shards * caches.power_of_two(-(-count // shards)), self.rows)

    def _place(self, x, spec: P) -> jax.Array:
        return place(x, self.mesh, spec)

    def _read_in_batches(self, asked: list[tuple[np.ndarray, np.ndarray]], new: int, compression: Compression | None):
        """(row numbers, cache, last activations, program) of each batch, whose prompts and questions are read."""
        prompts, window = [prompt for prompt, _ in asked], compression.window if compression else 0
        room = new + max(len(question) for _, question in asked)

        def sizes(longest: int):
            return self._sizes(longest + room, longest, max(window, 1))

        program, chunk, capacity = sizes(max(map(len, prompts)))
        shared, prefix = _common(prompts) - window, None
        if len(prompts) > 1 and shared >= chunk:
            with self._timed("prefill_s"):
                prefix, *_ = self._read(
                    program, chunk, self._new(self._padded(1), capacity, chunk), [prompts[0][:shared]] * self._padded(1)
                )
        for which in self._batches(prompts):
            if prefix is None:
                program, chunk, capacity = sizes(len(prompts[which[0]]))
            with self._timed("prefill_s"):
                rows, first = self._padded(len(which)), 0 if prefix is None else shared
                cache = (
                    self._new(rows, capacity, chunk)
                    if prefix is None
                    else self._run(caches.repeated, (rows // self._padded(1),), prefix)
                )
                unread = [prompts[row][first:] for row in which]
                if compression is None:
                    cache, last_BD, _ = self._read(program, chunk, cache, unread)
                else:
                    cache, last_BD = self._compress(program, chunk, cache, unread, compression, room)
                    if room > new:
                        cache, last_BD, _ = self._read(program, chunk, cache, [asked[row][1] for row in which], last_BD)
                cache = jax.block_until_ready(caches.resized(self.model, cache, capacity, 1, self._run))
            self.timing = self.timing._replace(cache_bytes=max(self.timing.cache_bytes, caches.num_bytes(cache)))
            yield which, cache, last_BD, program

    def _new(self, rows: int, capacity: int, chunk: int) -> Cache:
        return self._run(caches.empty, (self.model, rows, capacity, chunk, self.run.dtype, self.quantised))

    @contextlib.contextmanager
    def _timed(self, *names: str):
        """Adds the seconds that what it holds takes, compiling apart, to fields of `timing`."""
        started, compiled = time.perf_counter(), self.timing.compile_s
        yield
        seconds = time.perf_counter() - started - (self.timing.compile_s - compiled)
        self.timing = self.timing._replace(**{name: getattr(self.timing, name) + seconds for name in names})

    def _run(self, function: Callable, statics: tuple, *args):
        """What a jitted function gives; compiled apart, once for each size, so that the time of running is known."""
        key = (function, statics, jax.tree.structure(args), *map(jax.typeof, jax.tree.leaves(args)))
        if key not in self._programs:
            jax.block_until_ready(args)  # what still runs is not compiling
            started = time.perf_counter()
            self._programs[key] = function.lower(*statics, *args).compile()
            self.timing = self.timing._replace(compile_s=self.timing.compile_s + time.perf_counter() - started)
        return self._programs[key](*args)

    def _chunks(self, rows: list[np.ndarray], chunk: int, padded: int):
        """(tokens [B, T], counts [B]) of each chunk of rows that begin together."""
        for first in range(0, max(map(len, rows)), chunk):
            tokens_BT, counts_B = np.zeros((padded, chunk), np.int32), np.zeros(padded, np.int32)
            for b, row in enumerate(rows):
                part = row[first : first + chunk]
                tokens_BT[b, : len(part)], counts_B[b] = part, len(part)
            yield self._place(tokens_BT, TOKENS_BT), self._place(counts_B, P(BATCH))

    def _compress(self, program: Program, chunk: int, cache: Cache, rows, compression: Compression, room: int):
        """The compressed cache after these rows, and their last activations [B, D]; what votes are their last queries."""
        window = compression.window
        cache, last_BD, _ = self._read(program, chunk, cache, [row[:-window] for row in rows])
        cache, last_BD, queries = self._read(program, window, cache, [row[-window:] for row in rows], last_BD, queries=True)
        return compressed(self.model, compression, self.weights, cache, queries, SEED, room, self._run), last_BD

    def _read(self, program: Program, chunk: int, cache: Cache, rows, last_BD: jax.Array | None = None, queries: bool = False):
        """The cache after these rows, each row's last activations [B, D], and the last chunk's queries if they are wanted.

        `last_BD` stays where a row has nothing to read.
        """
        padded, found = cache.lengths_B.shape[0], ()
        if last_BD is None:
            last_BD = self._place(np.zeros((padded, self.model.d_model), self.run.dtype), P(BATCH, None))
        for tokens_BT, counts_B in self._chunks(rows, chunk, padded):
            cache, last_BD, found = self._run(read, (program, queries), self.weights, tokens_BT, counts_B, cache, last_BD)
        return cache, last_BD, found

    def _decode(
        self, program, cache, last_BD, which: list[int], seeds, most: int, sampling, stop_tokens, on_tokens
    ) -> list[Generated]:
        """What follows the rows `which`, whose last activations are `last_BD`."""
        padded, count = cache.lengths_B.shape[0], len(which)
        done_B = np.arange(padded) >= count
        seeds_B = self._place(np.resize(np.asarray([seeds[row] for row in which], np.uint32), padded), P(BATCH))
        stops = np.array([*stop_tokens] or [-1], np.int32)
        tokens, logprobs = [[] for _ in which], [[] for _ in which]
        number = 0
        while number < most and not done_B.all():
            steps = 1 if number == 0 else min(SLICE, most - number)
            scalars = np.int32(number), np.int32(steps)
            args = (self.weights, cache, last_BD, self._place(done_B, P(BATCH)), seeds_B, stops, *scalars)
            with self._timed("decode_s"):
                cache, last_BD, new = self._run(decode, (program, sampling), *args)
                new_tokens_BT, new_logprobs_BT, counts_B, done_B = map(np.array, jax.device_get(new))
            if not self.timing.first_token_s:
                self.timing = self.timing._replace(first_token_s=self.timing.prefill_s + self.timing.decode_s)
            for b, row in enumerate(which):
                mine, its_logprobs = new_tokens_BT[b, : counts_B[b]].tolist(), new_logprobs_BT[b, : counts_B[b]]
                _check_finite(row, number, its_logprobs)
                tokens[b] += mine
                logprobs[b] += its_logprobs.tolist()
                if mine and on_tokens and on_tokens(row, mine):
                    done_B[b] = True
            number += steps
        self.timing = self.timing._replace(new_tokens=self.timing.new_tokens + sum(map(len, tokens)))
        return [Generated(np.int32(a), np.float32(b)) for a, b in zip(tokens, logprobs, strict=True)]

    def _losses(self, rows: list[np.ndarray], inputs: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of each row from its start on."""
        longest = max(map(len, inputs))
        program, chunk, capacity = self._sizes(longest, longest)
        padded = self._padded(len(rows))
        cache, parts = self._new(padded, capacity, chunk), []
        last_BD = self._place(np.zeros((padded, self.model.d_model), self.run.dtype), P(BATCH, None))
        wanted = min(starts) - 1  # the first input whose next token is asked for
        targets = self._chunks([row[1:] for row in rows], chunk, padded)
        for i, (tokens_BT, counts_B) in enumerate(self._chunks(inputs, chunk, padded)):
            targets_BT, _ = next(targets)
            if (i + 1) * chunk <= wanted:
                cache, last_BD, _ = self._run(read, (program, False), self.weights, tokens_BT, counts_B, cache, last_BD)
                parts.append(np.zeros(tokens_BT.shape, np.float32))
            else:
                cache, nll_BT = self._run(score, (program,), self.weights, tokens_BT, targets_BT, counts_B, cache)
                parts.append(-np.asarray(jax.device_get(nll_BT)))
        if not parts:
            return [np.zeros(0, np.float32) for _ in rows]
        logprobs_BT = np.concatenate(parts, 1)
        return [logprobs_BT[b, start - 1 : len(row) - 1] for b, (row, start) in enumerate(zip(rows, starts, strict=True))]


def _check_options(most: int, prompts: int, seeds: Sequence[int], stop_tokens: Sequence[int], questions) -> None:
    """ValueError for options of `generate` that mean nothing for so many prompts."""
    if most < 1:
        raise ValueError(f"max_new_tokens={most} must be at least 1")
    for name, given in {"seeds": seeds, "questions": questions}.items():
        if given is not None and len(given) != prompts:
            raise ValueError(f"{len(given)} {name} were given for {prompts} prompts")
    for name, given, end in (("seed", seeds, 2**32), ("stop token", stop_tokens, 2**31)):
        if wrong := [x for x in given if not 0 <= x < end]:
            raise ValueError(f"{name} {wrong[0]} is not one of 0 to {end - 1}")


def _check_finite(row: int, first: int, logprobs: np.ndarray) -> None:
    """FloatingPointError if a log-probability of the tokens from number `first` on is not a number."""
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if len(bad):
        raise FloatingPointError(
            f"prompt {row}: the log-probability of token {first + int(bad[0])} is {logprobs[bad[0]]}: the parameters contain "
            "NaN, or activations overflow; use a checkpoint of an earlier step"
        )


def _common(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with, short of the last of any."""
    first, *others = sorted(prompts, key=len)
    same = len(first) - 1
    for other in others:
        differ = np.flatnonzero(first[:same] != other[:same])
        same = int(differ[0]) if len(differ) else same
    return same
