"""A conversation, whose KV cache stays from one reply to the next."""

from collections.abc import Sequence

import jax
import numpy as np

from hybrid_attn.infer import cache as caches
from hybrid_attn.infer.engine import DEFAULT_OPTIONS, Engine, Generated, Sizes, Timing
from hybrid_attn.infer.requests import GenerateOptions, OnTokens
from hybrid_attn.infer.steps import DecodeState
from hybrid_attn.trees import check


class Session(Engine):
    """An engine that keeps its KV cache: of a prompt that begins with the last prompt and completion, it reads only the rest.

    Another prompt is read from its beginning: a ring has no earlier tokens to go back to. So is one that outgrows the cache,
    which then gets twice the slots or more, and every prompt on a mesh that splits the tokens.
    """

    _tokens, _state, _slots = np.zeros(0, np.int32), None, 0  # what the cache has read, the state after that, its size

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, options: GenerateOptions = DEFAULT_OPTIONS, *,
        seeds: Sequence[int] | None = None, questions: None = None, on_tokens: OnTokens | None = None,
    ) -> list[Generated]:  # fmt: skip
        """`Engine.generate` of one prompt; `timing` counts the tokens that are read."""
        call = self._limits.call((prompts, questions), seeds, max_new_tokens, options, on_tokens)
        check(len(call.requests) == 1 and options.compression is None, "a session has one prompt at a time, not compressed")
        prompt = call.requests[0].prompt
        known = self._continued(prompt, len(prompt) + max_new_tokens)
        self.timing, sizes = Timing(len(prompt) - known), self._sizes(self._slots, self._slots)
        state, self._state = self._state, None  # its arrays are donated; a reply that fails leaves none
        with self._timed("prefill_s"):
            state = self._read(sizes, state if known else self._new_state(self._padded(1), sizes), prompt[known:])
        self.timing.cache_bytes = caches.num_bytes(state.cache)
        (generated,), self._state = self._decoded(call, [0], sizes.config, state)
        self._tokens = np.concatenate([prompt, generated.tokens])
        return [generated]

    def _continued(self, prompt: np.ndarray, total: int) -> int:
        """How many tokens of the prompt are in the cache: all that it has read, or none.

        Grows the cache if `total` tokens do not fit.
        """
        known = len(self._tokens)
        fits = self._state is not None and total <= self._slots and self.mesh.shape["context"] == 1
        if fits and known <= len(prompt) and (prompt[:known] == self._tokens).all():
            return known
        self._state, self._slots = None, max(self._slots, caches.power_of_two(total))
        return 0

    def _read(self, sizes: Sizes, state: DecodeState, tokens: np.ndarray) -> DecodeState:
        """The state after `tokens`, with rings for one token at a time."""
        state = state._replace(cache=caches.resized(self.model, state.cache, sizes.capacity, sizes.chunk, self._execute))
        state, _ = self._prefill(sizes, state, [tokens])
        cache = caches.resized(self.model, state.cache, sizes.capacity, 1, self._execute)
        return DecodeState(jax.block_until_ready(cache), state.last_BD)
