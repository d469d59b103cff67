"""What a model replies to samples, and what is kept of its replies."""

import hashlib
from collections.abc import Iterator, Sequence

from hybrid_attn.evals.ruler import scores
from hybrid_attn.evals.samples import Sample, check_lengths
from hybrid_attn.evals.types import EvalContext
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.text import AnswerOptions, answers

PROMPT_END = 400  # characters of a prompt that are kept beside its answer


def replies_to(context: EvalContext, samples: Sequence[Sample], spare: int = 0) -> list[str]:
    """A reply to each sample, whose length it may exceed by `spare` tokens; no prompt is cut to fit."""
    tokenizer = context.eval_model.tokenizer
    check_lengths(samples, tokenizer, spare)
    replies: dict[int, str] = {}
    for limit in sorted({sample.max_new_tokens for sample in samples}):  # a reply does not depend on the limits of others
        alike = [i for i, sample in enumerate(samples) if sample.max_new_tokens == limit]
        prompts = [samples[i].prompt for i in alike]
        options = AnswerOptions(GenerateOptions(stop_tokens=context.stop_tokens))
        texts = answers(context.engine, tokenizer, prompts, limit, options)
        replies |= {i: answer.text for i, answer in zip(alike, texts, strict=True)}
    return [replies[i] for i in range(len(samples))]


def answer_records(samples: Sequence[Sample], replies: Sequence[str]) -> Iterator[dict]:
    """A record for each sample: hash and end of its prompt, the right answers, the reply, and the share of them in it."""
    for sample, text in zip(samples, replies, strict=True):
        record = {name: getattr(sample, name) for name in ("task", "length", "index", "group", "meta")}
        share = scores.score(sample.task, text, sample.answers) / 100
        prompt = {"prompt_hash": hashlib.sha256(sample.prompt.encode()).hexdigest(), "prompt_end": sample.prompt[-PROMPT_END:]}
        yield record | prompt | {"wanted": list(sample.answers), "given": text, "score": share}
