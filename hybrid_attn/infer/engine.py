"""Prompts in, answers out: chunks of prompts are read into caches, then each row goes on token by token.

One compiled program reads every chunk, another decodes in one loop with a stop for each row. Prompts of like length share a
batch; what all of them begin with is read once.

Letters: B rows, T tokens of a chunk, D model, V vocabulary.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Config, Model
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.compress import Compression, compressed
from hybrid_attn.infer.sampling import GREEDY, Sampling, sample
from hybrid_attn.model import Run, logits, run_on, unembedding
from hybrid_attn.model.extend import Cache, extend, unstacked
from hybrid_attn.model.loss import token_losses
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT

SEED = 0  # of what a compression draws at random
SLICE = 32  # tokens of a row between two looks at what came, where anyone looks
LEAST_CHUNK = 16


class Generated(NamedTuple):
    """An answer: int32 tokens, the stop token included, and the log-probability that the model gave to each."""

    tokens: np.ndarray
    logprobs: np.ndarray


class Timing(NamedTuple):
    """Of the last call; `first_token_s` is until the rows of the first batch had a token, `cache_bytes` the largest batch's."""

    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    prefill_s: float
    decode_s: float
    cache_bytes: int


class Program(NamedTuple):
    """What programs are compiled for, besides shapes."""

    model: Model
    run: Run
    span: int  # slots that a shard of `context` takes in its turn: its part of a chunk


class Engine:
    """Generates and scores with `params` (as `model.init` makes them) on the mesh in force when it is made and used.

    `chunk` tokens of each prompt are read at a time; `cache` is "auto" (the dtype of the run) or "int8" for the layers that
    see the whole prefix; `capacity` is the most tokens of a row, prompt and answer together (None: what memory allows);
    `rows` is the most rows of a batch.
    """

    def __init__(
        self,
        params: dict,
        config: Config,
        *,
        chunk: int = 2048,
        cache: str = "auto",
        capacity: int | None = None,
        rows: int = 8,
    ):
        self.mesh = jax.sharding.get_mesh()
        context, shards = self.mesh.shape["context"], math.prod(self.mesh.shape[axis] for axis in BATCH)
        if cache not in ("auto", "int8"):
            raise ValueError(f"cache={cache!r} is not one of 'auto', 'int8'")
        if chunk < 1 or chunk % context:
            raise ValueError(f"chunk={chunk} does not split over {context} context shards; use a multiple of {context}")
        if rows < 1 or rows % shards:
            raise ValueError(f"rows={rows} does not split over {shards} shards of the batch; use a multiple of {shards}")
        self.model, self.chunk, self.capacity, self.rows, self.quantised = config.model, chunk, capacity, rows, cache == "int8"
        self.run = run_on(self.mesh.devices.flat[0].platform, config.model, config.train)
        self.weights = jax.jit(functools.partial(unstacked, config.model, dtype=self.run.dtype))(params)
        self.timing = Timing(0, 0, 0.0, 0.0, 0.0, 0)

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
        come; True ends the row. ValueError for a prompt that is empty, has a token out of the vocabulary, or does not fit.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if compression is not None and self.mesh.shape["context"] > 1:
            raise NotImplementedError("compression needs every slot on one device; use a mesh with context=1")
        asked = self._asked(prompts, questions, max_new_tokens, compression)
        prompts = [prompt for prompt, _ in asked]
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts")
        self.timing = Timing(sum(len(prompt) + len(question) for prompt, question in asked), 0, 0.0, 0.0, 0.0, 0)
        answers: dict[int, Generated] = {}
        for which, cache, last_BD, program in self._read_in_batches(asked, max_new_tokens, compression):
            told = [on_tokens and functools.partial(on_tokens, row) for row in which]
            found = self._decode(
                program, cache, last_BD, [seeds[row] for row in which], max_new_tokens, sampling, stop_tokens, told
            )
            answers |= dict(zip(which, found, strict=True))
        return [answers[row] for row in range(len(prompts))]

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token of each continuation after its prompt, float32; no array of all logits exists."""
        if len(prompts) != len(continuations):
            raise ValueError(f"{len(continuations)} continuations were given for {len(prompts)} prompts")
        whole = [[*prompt, *more] for prompt, more in zip(self._checked(prompts, 0), continuations, strict=True)]
        rows = self._checked(whole, 0)
        scores: dict[int, np.ndarray] = {}
        for which in self._batches(rows):
            inputs = [rows[row][:-1] for row in which]
            found = self._losses([rows[row] for row in which], inputs, [len(prompts[row]) for row in which])
            scores |= dict(zip(which, found, strict=True))
        return [scores[row] for row in range(len(rows))]

    def _asked(self, prompts, questions, new: int, compression: Compression | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each prompt with what is read after its cache is compressed."""
        nothing = np.zeros(0, np.int32)
        if questions is None:
            return [(prompt, nothing) for prompt in self._checked(prompts, new)]
        if len(questions) != len(prompts):
            raise ValueError(f"{len(questions)} questions were given for {len(prompts)} prompts")
        both = self._checked([[*prompt, *question] for prompt, question in zip(prompts, questions, strict=True)], new)
        if compression is None:
            return [(prompt, nothing) for prompt in both]
        return [(row[: len(prompt)], row[len(prompt) :]) for row, prompt in zip(both, self._checked(prompts, 0), strict=True)]

    def _checked(self, prompts: Sequence[Sequence[int]], new: int) -> list[np.ndarray]:
        rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
        for i, row in enumerate(rows):
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
        return shards * caches.power_of_two(-(-count // shards))

    def _place(self, x, spec: P) -> jax.Array:
        return jax.device_put(x, NamedSharding(self.mesh, spec))

    def _read_in_batches(self, asked: list[tuple[np.ndarray, np.ndarray]], new: int, compression: Compression | None):
        """(row numbers, cache, last activations, program) of each batch, whose prompts and questions are read."""
        prompts, longest = [prompt for prompt, _ in asked], max(len(prompt) for prompt, _ in asked)
        window, room = compression.window if compression else 0, new + max(len(question) for _, question in asked)
        program, chunk, capacity = self._sizes(longest + room, longest, max(window, 1))
        shared = _common(prompts) - window
        prefix = None
        if len(prompts) > 1 and shared >= chunk:
            started = time.perf_counter()
            prefix, *_ = self._read(program, chunk, self._new(self._padded(1), capacity, chunk), [prompts[0][:shared]])
            self._add(prefill_s=time.perf_counter() - started)
        for which in self._batches(prompts):
            started, rows = time.perf_counter(), self._padded(len(which))
            cache = self._new(rows, capacity, chunk) if prefix is None else caches.repeated(prefix, rows // self._padded(1))
            first = 0 if prefix is None else shared
            unread = [prompts[row][first:] for row in which]
            if compression is None:
                cache, last_BD, _ = self._read(program, chunk, cache, unread)
            else:
                cache, last_BD = self._compress(program, chunk, cache, unread, compression, room)
                if room > new:
                    cache, last_BD, _ = self._read(program, chunk, cache, [asked[row][1] for row in which], last_BD)
            cache = caches.resized(self.model, cache, capacity, 1)
            jax.block_until_ready(last_BD)
            self._add(prefill_s=time.perf_counter() - started)
            self.timing = self.timing._replace(cache_bytes=max(self.timing.cache_bytes, caches.num_bytes(cache)))
            yield which, cache, last_BD, program

    def _new(self, rows: int, capacity: int, chunk: int) -> Cache:
        return caches.empty(self.model, rows, capacity, chunk, self.run.dtype, self.quantised)

    def _add(self, **values) -> None:
        self.timing = self.timing._replace(**{name: getattr(self.timing, name) + x for name, x in values.items()})

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
        return compressed(self.model, compression, self.weights, cache, queries, SEED, room), last_BD

    def _read(self, program: Program, chunk: int, cache: Cache, rows, last_BD: jax.Array | None = None, queries: bool = False):
        """The cache after these rows, each row's last activations [B, D], and the last chunk's queries if they are wanted.

        `last_BD` stays where a row has nothing to read.
        """
        padded, found = cache.lengths_B.shape[0], ()
        if last_BD is None:
            last_BD = self._place(np.zeros((padded, self.model.d_model), self.run.dtype), P(BATCH, None))
        for tokens_BT, counts_B in self._chunks(rows, chunk, padded):
            cache, last_BD, found = _read(program, queries, self.weights, tokens_BT, counts_B, cache, last_BD)
        return cache, last_BD, found

    def _decode(self, program, cache, last_BD, seeds, most: int, sampling, stop_tokens, asked) -> list[Generated]:
        padded, count = cache.lengths_B.shape[0], len(seeds)
        done_B = np.arange(padded) >= count
        seeds_B = self._place(np.resize(np.asarray(seeds, np.uint32), padded), P(BATCH))
        stops = jnp.asarray([*stop_tokens] or [-1], jnp.int32)
        tokens, logprobs = [[] for _ in seeds], [[] for _ in seeds]
        number, started = 0, time.perf_counter()
        while number < most and not done_B.all():
            steps = 1 if number == 0 else min(SLICE, most - number)
            cache, last_BD, new = decode(
                program, sampling, self.weights, cache, last_BD, self._place(done_B, P(BATCH)), seeds_B, stops, number, steps
            )
            new_tokens_BT, new_logprobs_BT, counts_B, done_B = map(np.array, jax.device_get(new))
            if number == 0 and not self.timing.first_token_s:
                self._add(first_token_s=self.timing.prefill_s + time.perf_counter() - started)
            for b in range(count):
                mine = new_tokens_BT[b, : counts_B[b]].tolist()
                tokens[b] += mine
                logprobs[b] += new_logprobs_BT[b, : counts_B[b]].tolist()
                if mine and asked[b] and asked[b](mine):
                    done_B[b] = True
            number += steps
        self._add(decode_s=time.perf_counter() - started, new_tokens=sum(map(len, tokens)))
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
                cache, last_BD, _ = _read(program, False, self.weights, tokens_BT, counts_B, cache, last_BD)
                parts.append(np.zeros(tokens_BT.shape, np.float32))
            else:
                cache, nll_BT = _score(program, self.weights, tokens_BT, targets_BT, counts_B, cache)
                parts.append(-np.asarray(jax.device_get(nll_BT)))
        logprobs_BT = np.concatenate(parts, 1)
        return [logprobs_BT[b, start - 1 : len(row) - 1] for b, (row, start) in enumerate(zip(rows, starts, strict=True))]


def _common(prompts: list[np.ndarray]) -> int:
    """How many tokens all prompts begin with, short of the last of any."""
    first, *others = sorted(prompts, key=len)
    same = len(first) - 1
    for other in others:
        differ = np.flatnonzero(first[:same] != other[:same])
        same = int(differ[0]) if len(differ) else same
    return same


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5, 6))
def _read(program: Program, with_queries: bool, weights, tokens_BT, counts_B, cache: Cache, last_BD):
    x_BTD, cache, queries = extend(program.model, weights, tokens_BT, counts_B, cache, program.run, program.span)
    ends_BT = jax.reshard(jnp.arange(tokens_BT.shape[1]) == counts_B[:, None] - 1, TOKENS_BT)
    # A sum over one: the token may be on another shard.
    here_BD = jnp.einsum("BT,BTD->BD", ends_BT.astype(x_BTD.dtype), x_BTD, out_sharding=P(BATCH, None))
    return cache, jnp.where(counts_B[:, None] > 0, here_BD, last_BD), queries if with_queries else ()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _score(program: Program, weights, tokens_BT, targets_BT, counts_B, cache: Cache) -> tuple[Cache, jax.Array]:
    x_BTD, cache, _ = extend(program.model, weights, tokens_BT, counts_B, cache, program.run, program.span)
    table_VD = unembedding(program.model, weights)
    return cache, token_losses(program.model, table_VD, x_BTD, targets_BT, program.run.loss_chunk)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def decode(program: Program, sampling: Sampling, weights, cache: Cache, last_BD, done_B, seeds_B, stops, number, steps):
    """Up to `steps` tokens of each row that is not done, of which the first is the row's `number`-th, from 0.

    Returns the cache, the last activations, and (tokens [B, SLICE], log-probabilities, how many, which rows are done).
    """
    zeros_BT = jnp.zeros((done_B.shape[0], SLICE), jnp.int32, out_sharding=P(BATCH, None))

    def go_on(carry):
        i, *_, done_B = carry
        return (i < steps) & ~jnp.all(done_B)

    def step(carry):
        i, cache, last_BD, tokens_BT, logprobs_BT, counts_B, done_B = carry
        logits_BV = logits(program.model, weights, last_BD[:, None])[:, 0]
        logits_BV = jax.reshard(logits_BV, P(BATCH, None))
        numbers_B = jnp.full_like(counts_B, number) + i
        new_B, logprob_B = sample(logits_BV, sampling, seeds_B, numbers_B)
        tokens_BT = jax.lax.dynamic_update_index_in_dim(tokens_BT, new_B, i, 1)
        logprobs_BT = jax.lax.dynamic_update_index_in_dim(logprobs_BT, logprob_B, i, 1)
        counts_B += ~done_B
        x_B1D, cache, _ = extend(
            program.model, weights, new_B[:, None], (~done_B).astype(jnp.int32), cache, program.run, program.span
        )
        done_B |= (new_B[:, None] == stops).any(1)
        return i + 1, cache, x_B1D[:, 0], tokens_BT, logprobs_BT, counts_B, done_B

    counts_B = jnp.zeros_like(done_B, jnp.int32)
    start = (jnp.int32(0), cache, last_BD, zeros_BT, zeros_BT.astype(jnp.float32), counts_B, done_B)
    _, cache, last_BD, *new = jax.lax.while_loop(go_on, step, start)
    return cache, last_BD, tuple(new)
