"""Completions and scores: prompts are prefilled chunk by chunk into a KV cache, then decoded token by token.

One compiled program reads every chunk, another decodes in one loop with a stop for each request. Prompts of similar length
share a batch; a prefix that all of them share is read once.

Letters: B requests, T tokens of a chunk, D model.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import CheckpointConfig
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.cache import Cache
from hybrid_attn.infer.requests import Call, GenerateOptions, Limits, OnTokens, Request, batches, check_finite, common_prefix
from hybrid_attn.infer.steps import SLICE, DecodeSlice, DecodeState, StepConfig, decode, prefill, score
from hybrid_attn.model import Execution, execution_on
from hybrid_attn.model.transformer import unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT, batch_shards, put
from hybrid_attn.trees import check

DEFAULT_CHUNK = 2048
DEFAULT_BATCH_SIZE = 8  # or as many requests as a batch has shards
DEFAULT_OPTIONS = GenerateOptions()
MIN_CHUNK = 16
WEIGHTS = jax.jit(unstacked, static_argnums=(0, 2))


class Generated(NamedTuple):
    """A completion: int32 tokens, the stop token included, and the model's log-probability of each."""

    tokens: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass
class Timing:
    """Sizes and seconds of the last call. Compiling, which happens once for each size, is not part of the other seconds.

    `first_token_s` lasts until the requests of the first batch have a token; `cache_bytes` is the largest batch's.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    cache_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """The sizes of an engine's programs and the numbers of its cache.

    `chunk` tokens of each prompt are read at a time, for at most `batch_size` requests (None: `DEFAULT_BATCH_SIZE`, or as many
    as the batch has shards). `cache` is "auto" (the dtype of the activations), or "int8" for the layers that see all
    earlier tokens. `capacity` is the most tokens of a prompt and its completion together; None is what memory allows. `slice`
    tokens are decoded before the host looks at them.
    """

    chunk: int = DEFAULT_CHUNK
    cache: str = "auto"
    capacity: int | None = None
    batch_size: int | None = None
    slice: int = SLICE

    def on(self, mesh: Mesh) -> "EngineOptions":
        """The options with a batch size; ValueError for those that are out of range or do not fit the mesh."""
        context, shards = mesh.shape["context"], batch_shards(mesh)
        check(1 <= self.slice <= SLICE, f"slice={self.slice} is not one of 1 to {SLICE} tokens")
        check(self.cache in ("auto", "int8"), f"cache={self.cache!r} is not one of 'auto', 'int8'")
        splits = self.chunk >= 1 and self.chunk % context == 0
        check(splits, f"chunk={self.chunk} does not split over {context} context shards; use a multiple of {context}")
        size = -(-DEFAULT_BATCH_SIZE // shards) * shards if self.batch_size is None else self.batch_size
        splits, cure = size >= 1 and size % shards == 0, f"use a multiple of {shards}"
        check(splits, f"a batch of {size} requests does not split over {shards} shards of the batch; {cure}")
        return dataclasses.replace(self, batch_size=size)


class Sizes(NamedTuple):
    """What the programs of a batch are compiled for: the step's config, tokens of a chunk, and slots of a request."""

    config: StepConfig
    chunk: int
    capacity: int


class Engine:
    """Generates and scores with `params` (as `model.init` makes them) on the mesh in force when it is made and used.

    `programs` is a dict of compiled programs, which engines on one mesh may share. `execution` is by default that of the config
    on this platform. Several processes make the same calls and get the same results.
    """

    def __init__(
        self, params: dict, config: CheckpointConfig, options: EngineOptions = EngineOptions(),
        programs: dict | None = None, execution: Execution | None = None,
    ):  # fmt: skip
        self.mesh = jax.sharding.get_mesh()
        options = options.on(self.mesh)
        self.chunk, self.capacity, self.batch_size = options.chunk, options.capacity, options.batch_size
        self.slice, self.quantised, self.model = options.slice, options.cache == "int8", config.model
        platform = self.mesh.devices.flat[0].platform
        self.execution = execution_on(platform, config.model, config.train) if execution is None else execution
        self.weights = WEIGHTS(config.model, params, self.execution.dtype)
        self.timing = Timing()
        self._limits = Limits(config.model, options.capacity)
        self._programs: dict[tuple, Callable] = {} if programs is None else programs

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, options: GenerateOptions = DEFAULT_OPTIONS, *,
        seeds: Sequence[int] | None = None, questions: Sequence[Sequence[int]] | None = None, on_tokens: OnTokens | None = None,
    ) -> list[Generated]:  # fmt: skip
        """A completion of each prompt, at most `max_new_tokens` long, ended by a stop token if one comes.

        `questions` follow the prompts. With a compression, global layers keep a part of each prompt, and the questions are read
        after that. `seeds` (0, 1, ... by default) make a completion the same in any batch. `on_tokens(index, ids)` is called as
        tokens come; if it returns True, the request ends. ValueError for a prompt that is empty, has a token outside the
        vocabulary, or does not fit; FloatingPointError where a logit is not finite.
        """
        call = self._limits.call((prompts, questions), seeds, max_new_tokens, options, on_tokens)
        if options.compression is not None and (self.mesh.shape["context"] > 1 or self.mesh.is_multi_process):
            raise NotImplementedError("compression needs every slot on one device of one process; use a mesh with context=1")
        if not call.requests:
            return []
        self.timing = Timing(sum(len(request.prompt) + len(request.question) for request in call.requests))
        results: dict[int, Generated] = {}
        for indices, config, state in self._prefilled_batches(call):
            results |= dict(zip(indices, self._decoded(call, indices, config, state)[0], strict=True))
        return [results[i] for i in range(len(call.requests))]

    def score(self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability, float32, of each token of each continuation after its prompt; FloatingPointError if not finite."""
        number, expected = len(continuations), len(prompts)
        check(number == expected, f"{number} continuations do not match {expected} prompts; use one for each prompt")
        checked = self._limits.checked(prompts, 0)
        sequences = [[*prompt, *more] for prompt, more in zip(checked, continuations, strict=True)]
        sequences = self._limits.checked(sequences, 0)
        scores: dict[int, np.ndarray] = {}
        for indices in batches(sequences, self.batch_size):
            starts = [len(prompts[i]) for i in indices]
            logprobs = self._logprobs([sequences[i] for i in indices], starts)
            for i, start, of_sequence in zip(indices, starts, logprobs, strict=True):
                check_finite(i, start, of_sequence)
            scores |= dict(zip(indices, logprobs, strict=True))
        return [scores[i] for i in range(len(sequences))]

    def _sizes(self, total: int, longest: int, min_chunk: int = 1) -> Sizes:
        """Sizes for requests of at most `total` tokens, `longest` of them read in chunks of `min_chunk` or more."""
        context = self.mesh.shape["context"]
        chunk = min(self.chunk, context * caches.power_of_two(max(-(-longest // context), MIN_CHUNK)))
        chunk = max(chunk, caches.power_of_two(min_chunk))
        capacity = caches.request_slots(total, chunk)
        return Sizes(StepConfig(self.model, self.execution, chunk // context), chunk, capacity)

    def _padded(self, count: int) -> int:
        """The size of the batch in which `count` requests are read."""
        shards = batch_shards(self.mesh)
        return min(shards * caches.power_of_two(-(-count // shards)), self.batch_size)

    def _put(self, x: np.ndarray, spec: P) -> jax.Array:
        return put(x, self.mesh, spec)

    def _prefilled_batches(self, call: Call) -> Iterator[tuple[list[int], StepConfig, DecodeState]]:
        """The numbers of the requests of each batch, what its steps are compiled for, and its state after the prompts."""
        prompts, window = [request.prompt for request in call.requests], call.options.window

        def sizes_for(longest: int) -> Sizes:
            return self._sizes(longest + call.room, longest, max(window, 1))

        sizes = sizes_for(max(map(len, prompts)))
        prefix, prefix_cache = self._shared_prefix(prompts, window, sizes)
        for indices in batches(prompts, self.batch_size):
            if prefix_cache is None:
                sizes = sizes_for(len(prompts[indices[0]]))
            with self._timed("prefill_s"):
                state = self._prefilled([call.requests[i] for i in indices], call, sizes, prefix, prefix_cache)
                # Rings for one token at a time.
                cache = caches.resized(self.model, state.cache, sizes.capacity, 1, self._execute)
                state = DecodeState(jax.block_until_ready(cache), state.last_BD)
            self.timing.cache_bytes = max(self.timing.cache_bytes, caches.num_bytes(state.cache))
            yield indices, sizes.config, state

    def _shared_prefix(self, prompts: list[np.ndarray], window: int, sizes: Sizes) -> tuple[int, Cache | None]:
        """How many tokens all prompts share before their last `window`, and their cache; 0 and None if less than a chunk."""
        length = common_prefix(prompts) - window
        if len(prompts) == 1 or length < sizes.chunk:
            return 0, None
        batch_size = self._padded(1)
        with self._timed("prefill_s"):
            state = self._new_state(batch_size, sizes)
            state, _ = self._prefill(sizes, state, [prompts[0][:length]] * batch_size)
        return length, state.cache

    def _prefilled(
        self, requests: list[Request], call: Call, sizes: Sizes, prefix: int, prefix_cache: Cache | None
    ) -> DecodeState:
        """The state after prompts and questions, of which the first `prefix` tokens are read."""
        batch_size = self._padded(len(requests))
        if prefix_cache is None:
            state = self._new_state(batch_size, sizes)
        else:
            cache = self._execute(caches.repeated, (batch_size // self._padded(1),), prefix_cache)
            state = DecodeState(cache, self._zeros(batch_size))
        unread = [request.prompt[prefix:] for request in requests]
        if call.options.compression is None:
            return self._prefill(sizes, state, unread)[0]
        # The cache is compressed by the queries of each request's last tokens.
        compression, window = call.options.compression, call.options.window
        state, _ = self._prefill(sizes, state, [tokens[:-window] for tokens in unread])
        last, of_window = [tokens[-window:] for tokens in unread], sizes._replace(chunk=window)
        state, queries = self._prefill(of_window, state, last, with_queries=True)
        cache = caches.compressed(compression, self.model, state.cache, queries, call.room, self._execute)
        state = DecodeState(cache, state.last_BD)
        if call.room > call.max_new_tokens:
            state, _ = self._prefill(sizes, state, [request.question for request in requests])
        return state

    def _prefill(self, sizes: Sizes, state: DecodeState, sequences: list[np.ndarray], with_queries: bool = False):
        """The state after these tokens of each request, and the queries of the last chunk if they are needed."""
        queries = ()
        for tokens_BT, counts_B in self._chunks(sequences, sizes.chunk, len(state.last_BD)):
            state, queries = self._execute(prefill, (sizes.config, with_queries), self.weights, state, tokens_BT, counts_B)
        return state, queries

    def _chunks(self, sequences: list[np.ndarray], chunk: int, batch_size: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """(tokens_BT, counts_B) of each chunk of sequences that start together, padded to `batch_size` sequences."""
        for first in range(0, max(map(len, sequences)), chunk):
            tokens_BT, counts_B = np.zeros((batch_size, chunk), np.int32), np.zeros(batch_size, np.int32)
            for b, sequence in enumerate(sequences):
                tokens = sequence[first : first + chunk]
                tokens_BT[b, : len(tokens)], counts_B[b] = tokens, len(tokens)
            yield self._put(tokens_BT, TOKENS_BT), self._put(counts_B, P(BATCH))

    def _zeros(self, batch_size: int) -> jax.Array:
        return self._put(np.zeros((batch_size, self.model.d_model), self.execution.dtype), P(BATCH, None))

    def _new_state(self, batch_size: int, sizes: Sizes) -> DecodeState:
        static_args = self.model, batch_size, sizes.capacity, sizes.chunk, self.execution.dtype, self.quantised
        return DecodeState(self._execute(caches.empty, static_args), self._zeros(batch_size))

    @contextlib.contextmanager
    def _timed(self, name: str):
        """Adds the seconds of the body, without compiling, to a field of `timing`."""
        started, compiled = time.perf_counter(), self.timing.compile_s
        yield
        seconds = time.perf_counter() - started - (self.timing.compile_s - compiled)
        setattr(self.timing, name, getattr(self.timing, name) + seconds)

    def _execute(self, function: Callable, static_args: tuple, *args):
        """The result of a jitted function, which is compiled first, once for each size; compiling is timed apart."""
        key = (function, static_args, jax.tree.structure(args), *map(jax.typeof, jax.tree.leaves(args)))
        if key not in self._programs:
            jax.block_until_ready(args)  # earlier work does not count as compiling
            started = time.perf_counter()
            self._programs[key] = function.lower(*static_args, *args).compile()
            self.timing.compile_s += time.perf_counter() - started
        return self._programs[key](*args)

    def _decoded(
        self, call: Call, indices: list[int], config: StepConfig, state: DecodeState
    ) -> tuple[list[Generated], DecodeState]:
        """The completions of a batch, and the state after them."""
        batch_size = len(state.last_BD)
        done_B = np.arange(batch_size) >= len(indices)
        seeds = np.asarray([call.requests[i].seed for i in indices], np.uint32)
        seeds_B = self._put(np.resize(seeds, batch_size), P(BATCH))
        stop_tokens = np.array([*call.options.stop_tokens] or [-1], np.int32)
        tokens, logprobs = [[] for _ in indices], [[] for _ in indices]
        number = 0
        while number < call.max_new_tokens and not done_B.all():
            steps = 1 if number == 0 else min(self.slice, call.max_new_tokens - number)
            part = DecodeSlice(self._put(done_B, P(BATCH)), seeds_B, stop_tokens, np.int32(number), np.int32(steps))
            with self._timed("decode_s"):
                state, new = self._execute(decode, (config, call.options.sampling), self.weights, state, part)
                new_tokens_BT, new_logprobs_BT, counts_B, done_B = (np.array(x) for x in jax.device_get(new))
            self.timing.first_token_s = self.timing.first_token_s or self.timing.prefill_s + self.timing.decode_s
            for b, index in enumerate(indices):
                ids, new_logprobs = new_tokens_BT[b, : counts_B[b]].tolist(), new_logprobs_BT[b, : counts_B[b]]
                check_finite(index, number, new_logprobs)
                tokens[b] += ids
                logprobs[b] += new_logprobs.tolist()
                if ids and call.on_tokens and call.on_tokens(index, ids):
                    done_B[b] = True
            number += steps
        self.timing.new_tokens += sum(map(len, tokens))
        return [Generated(np.int32(a), np.float32(b)) for a, b in zip(tokens, logprobs, strict=True)], state

    def _logprobs(self, sequences: list[np.ndarray], starts: list[int]) -> list[np.ndarray]:
        """Log-probabilities of each sequence's tokens from its start on."""
        longest = max(map(len, sequences)) - 1
        sizes, batch_size = self._sizes(longest, longest), self._padded(len(sequences))
        state, parts = self._new_state(batch_size, sizes), []
        first_input = min(starts) - 1  # its next token is the first that is scored
        inputs = self._chunks([sequence[:-1] for sequence in sequences], sizes.chunk, batch_size)
        targets = self._chunks([sequence[1:] for sequence in sequences], sizes.chunk, batch_size)
        for i, ((tokens_BT, counts_B), (targets_BT, _)) in enumerate(zip(inputs, targets, strict=True)):
            if (i + 1) * sizes.chunk <= first_input:
                state, _ = self._execute(prefill, (sizes.config, False), self.weights, state, tokens_BT, counts_B)
                parts.append(np.zeros(tokens_BT.shape, np.float32))
            else:
                chunk = tokens_BT, targets_BT, counts_B
                cache, nll_BT = self._execute(score, (sizes.config,), self.weights, state.cache, *chunk)
                state = DecodeState(cache, state.last_BD)
                parts.append(-np.asarray(jax.device_get(nll_BT)))
        if not parts:
            return [np.zeros(0, np.float32) for _ in sequences]
        logprobs_BT = np.concatenate(parts, 1)
        return [logprobs_BT[b, start - 1 : len(x) - 1] for b, (x, start) in enumerate(zip(sequences, starts, strict=True))]
