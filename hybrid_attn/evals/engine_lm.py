"""Tasks of lm-evaluation-harness (the extra `harness`), asked of an `Engine` in process.

What a continuation is, how a text that is longer than the model reads is cut into windows and which of a prompt's tokens are
left out are the harness's own definitions. A context begins with BOS, as sequences do in training.
"""

import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hybrid_attn.evals.types import check_finite
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.text import TextStream
from hybrid_attn.trees import check, suggestion

try:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when the libraries below are imported
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of bootstraps: a fork of a process that runs JAX may hang
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ImportError as error:
    raise ImportError(f"lm-evaluation-harness needs what is not here ({error}): pip install 'hybrid_attn[harness]'") from error

BATCHES = 16  # of an engine's, between two steps of the progress bar
BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p"}  # of `generate_until`
WHOLE = re.compile("ruler|niah|needle|passkey|babilong", re.IGNORECASE)  # in names of tasks that hide answers in their prompts


def evaluate(
    engine, tokenizer, tasks: Sequence[str], *, max_length: int, include_path: str | os.PathLike | None = None,
    limit: int | float | None = None, stop_tokens: Sequence[int] = (),
) -> dict | None:  # fmt: skip
    """What the harness reports of `tasks`, as values that JSON can hold; None on every process but the first.

    Tasks are names of those in the YAML files under `include_path`, of the harness's own, or paths of YAML files. Those that
    make their own documents find what they need in the `metadata` of their file. A file may name Python functions
    (`!function`), which then run: use files that you trust. `limit` is a number of documents of each, or a share
    below 1. The other arguments are those of `EngineLM`, whose `counts` are added under "requests". Every process must call it.
    ValueError for an unknown task.
    """
    check(bool(tasks), "no task is named; name at least one")
    check(limit is None or limit > 0, f"limit={limit} leaves no document of a task; use at least 1, or None for all")
    lm = EngineLM(engine, tokenizer, max_length, stop_tokens=stop_tokens)
    manager = find_tasks(tasks, include_path)
    results = simple_evaluate(model=lm, tasks=[*tasks], task_manager=manager, limit=limit, bootstrap_iters=BOOTSTRAPS)
    if jax.process_index() > 0 or results is None:
        return None
    return json.loads(json.dumps(results | {"requests": lm.counts()}, default=handle_non_serializable))


def records(results: dict) -> Iterator[dict]:
    """A record for each task, metric and filter of what `evaluate` returned, with the counts of the task's requests."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            record = {"task": task, "metric": metric, "filter": chosen, "value": value}
            record |= {"stderr": stderr if isinstance(stderr, (int, float)) else None, "documents": values["sample_len"]}
            record |= {"shots": results["n-shot"].get(task), "version": results["versions"].get(task)}
            yield record | results["requests"].get(task, {})


class EngineLM(LM):
    """A model as the harness asks it: three kinds of request, with results in the order of the requests.

    `max_length` is the most tokens that are read at once, a generated answer's included; a scored answer's last token is not
    read. What is longer loses its beginning, and is counted; of a task that hides answers in its prompts it is a ValueError.
    Such a task has ruler, niah, needle, passkey or babilong in its name, or documents with a "max_length", as RULER's have.

    One process or many ask the same questions on the same mesh, so the harness sees one.
    """

    def __init__(self, engine, tokenizer, max_length: int, *, stop_tokens: Sequence[int] = ()):
        super().__init__()
        check(max_length >= 1, f"max_length={max_length} must be at least 1 token")
        if engine.capacity is not None and engine.capacity <= max_length:
            raise ValueError(
                f"max_length={max_length:,} and the token after it do not fit the engine's capacity of {engine.capacity:,}; "
                f"use max_length={engine.capacity - 1:,}, or make the engine with capacity={max_length + 1}"
            )
        self.engine, self.tokenizer, self.max_length = engine, tokenizer, max_length
        self._stop_tokens = tuple(stop_tokens)
        self._counts = defaultdict(Counter)

    def counts(self) -> dict[str, dict[str, int]]:
        """By task: requests; those that lost the beginning of their prompt; texts that were scored in several windows."""
        kinds = ("requests", "truncated", "windowed")
        return {task: {kind: counts[kind] for kind in kinds} for task, counts in self._counts.items()}

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether a greedy answer begins with it."""
        pairs = []
        for request in requests:
            context, continuation = self._split(*request.args)
            if not continuation:
                raise ValueError(
                    f"{request.task_name}, document {request.doc_id}: no token is left of the answer {request.args[1]!r}, "
                    "which the tokenizer joins with its context; use another task or tokenizer"
                )
            pairs.append((self._cut(request, context, self.max_length + 1 - len(continuation)), continuation))
        return list(zip(self._scores(pairs), self._are_greedy(pairs), strict=True))

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Log-probability of each whole text; of one longer than `max_length`, that of its windows, added up."""
        windows = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(self._ids(text)[1:], self.tokenizer.bos, self.max_length, 1)
            windows.append([make_disjoint_window(window) for window in rolling])
            self._counts[request.task_name] += Counter(requests=1, windowed=len(windows[-1]) > 1)
        scores = iter(self._scores([pair for pairs in windows for pair in pairs]))
        return [sum(itertools.islice(scores, len(pairs))) for pairs in windows]

    def generate_until(self, requests) -> list[str]:
        """An answer to each context, up to the first of its stops. A sampled one does not depend on the other requests."""
        questions, seen = [], Counter()
        for request in requests:
            context, _ = request.args
            stops, options = _options(request)
            seen[context] += 1
            seed = hashlib.sha256(f"{seen[context]} {context}".encode()).digest()[:4]
            prompt = self._cut(request, self._ids(context), self.max_length - options[0])
            questions.append((options, prompt, stops, int.from_bytes(seed)))
        return in_turn(questions, self._continue, BATCHES * self.engine.batch_size, "answers")

    def _ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos, *self.tokenizer.encode(text.encode()).tolist()]

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, as the harness defines them (`TemplateLM._encode_pair`).

        The context is encoded alone; the continuation is what both together have after as many tokens, even where a token
        crosses the border. Spaces at the end of the context belong to the continuation.
        """
        context_ids = self._ids(context.rstrip())
        return context_ids, self._ids(context + continuation)[len(context_ids) :]

    def _cut(self, request, prompt: list[int], room: int) -> list[int]:
        """The last `room` tokens of a prompt; counts, or refuses, what is lost."""
        self._counts[request.task_name]["requests"] += 1
        lost, where = len(prompt) - room, f"{request.task_name}, document {request.doc_id}: a prompt of {len(prompt):,} tokens"
        if lost <= 0:
            return prompt
        least = f"raise max_length={self.max_length:,} to {self.max_length + lost:,}"
        if room < 1:
            raise ValueError(f"{where} has no room beside its answer of {self.max_length + lost - len(prompt):,}; {least}")
        if WHOLE.search(request.task_name or "") or "max_length" in request.doc:
            raise ValueError(f"{where} would lose its first {lost:,}, and what is asked for with them; {least}")
        self._counts[request.task_name]["truncated"] += 1
        return prompt[lost:]

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        def ask(questions):
            _, contexts, continuations = zip(*questions, strict=True)
            scores = [float(x.sum(dtype=np.float64)) for x in self.engine.score(contexts, continuations)]
            check_finite(scores, "the log-probability of a continuation")
            return scores

        return in_turn([(0, *pair) for pair in pairs], ask, BATCHES * self.engine.batch_size, "scores")

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy answers begin with the continuations: one answer to each context, which ends where all differ."""
        continuations = defaultdict(list)
        for context, continuation in pairs:
            continuations[tuple(context)].append(continuation)

        def ask(questions):
            longest, contexts = questions[0][0], [context for _, context in questions]
            came = [[] for _ in contexts]

            def on_tokens(request: int, ids: list[int]) -> bool:
                came[request] += ids
                open_ends = (x for x in continuations[contexts[request]] if len(x) > len(came[request]))
                return not any(x[: len(came[request])] == came[request] for x in open_ends)

            self.engine.generate(contexts, longest, on_tokens=on_tokens)
            return came

        questions = [(max(1, *map(len, more)), context) for context, more in continuations.items()]
        answered = in_turn(questions, ask, BATCHES * self.engine.batch_size, "greedy answers")
        answers = dict(zip(continuations, answered, strict=True))
        return [answers[tuple(context)][: len(continuation)] == continuation for context, continuation in pairs]

    def _continue(self, questions: Sequence[tuple]) -> list[str]:
        options, prompts, stops, seeds = zip(*questions, strict=True)
        new, temperature, top_k, top_p, min_p = options[0]
        streams = [TextStream(self.tokenizer, *both) for both in zip(stops, prompts, strict=True)]
        texts = ["" for _ in streams]

        def on_tokens(request: int, ids: list[int]) -> bool:
            texts[request] += streams[request].add(ids)
            return streams[request].stopped

        sampling = Sampling(temperature, top_k or None, top_p or None, min_p or None)
        options = GenerateOptions(sampling, self._stop_tokens)
        self.engine.generate(prompts, new, options=options, seeds=seeds, on_tokens=on_tokens)
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def in_turn(questions: Sequence[tuple], ask: Callable[[list[tuple]], list], at_once: int, name: str) -> list:
    """What `ask` gives to questions (group, ids, ...): to so many of one group at a time, the longest first.

    Which are asked together follows from what they are and not from their order, so an answer is the same to its last bit.
    """
    order = sorted(range(len(questions)), key=lambda i: (questions[i][0], -len(questions[i][1]), questions[i][1:]))
    groups = [[*group] for _, group in itertools.groupby(order, key=lambda i: questions[i][0])]
    turns = [group[first : first + at_once] for group in groups for first in range(0, len(group), at_once)]
    results = {}
    for turn in tqdm(turns, name, disable=jax.process_index() > 0):
        results |= dict(zip(turn, ask([questions[i] for i in turn]), strict=True))
    return [results[i] for i in range(len(questions))]


def _options(request) -> tuple[tuple[str, ...], tuple]:
    """The stops of a request, and (most tokens, temperature, top_k, top_p, min_p) with 0 for what is off."""
    options = {name: x for name, x in normalize_gen_kwargs(request.args[1]).items() if (name, x) != ("num_beams", 1)}
    if unknown := sorted(set(options) - OPTIONS):
        raise ValueError(
            f"{request.task_name} has {unknown[0]!r} in its generation_kwargs, which may have only {', '.join(sorted(OPTIONS))}"
        )
    filters = [0, 0, 0]
    if options["do_sample"]:
        filters = [max(options.get(name) or 0, 0) for name in ("top_k", "top_p", "min_p")]
    temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
    return tuple(options["until"]), (options["max_gen_toks"], temperature, *filters)


def find_tasks(names: Sequence[str], include_path) -> TaskManager:
    """The tasks under `include_path`, and the harness's own where a name is not among them; ValueError for other names."""
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path} is no directory; name the one that holds the YAML files of tasks")
    for include_defaults in (False, True):
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        unknown = [name for name in names if name not in manager.task_index and not Path(name).is_file()]
        if not unknown:
            return manager
    hint = suggestion(unknown[0], manager.all_tasks, "; ")
    raise ValueError(f"there is no task {unknown[0]!r} under include_path={include_path} and none in the harness{hint}")
