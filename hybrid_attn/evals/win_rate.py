"""Win rate: a model's answers to prompts of a file, which another model judges, and how diverse they are.

The records of one model are its answers with the judge's mean log-probability of a token of each. A report compares two models
on the same prompts: the share of prompts where one has the larger mean, and the mean of sigmoid(difference), as the study of
arXiv 2410.11677 has it of the rewards of a reward model. By default answers are sampled as there, with top-p 0.75 and
temperature 0.5; each prompt has a seed of its own. A log-probability is no quality: a judge finds repetitions likely.
"""

from collections.abc import Mapping

from hybrid_attn.evals.diversity import distinct
from hybrid_attn.evals.evaluation import Evaluation, Headline, measured_of_source, report_of
from hybrid_attn.evals.records import NAME, SHARE, SIZE, TEXT, list_of, mean_of, number, or_none
from hybrid_attn.evals.replies import PROMPT_END
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.types import EvalContext, Measured, Settings, Unit, check_finite
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.infer.sampling import Sampling
from hybrid_attn.infer.text import AnswerOptions, answers
from hybrid_attn.trees import check


def measure(context: EvalContext, settings: Settings, unit: Unit, samples: list[Sample]) -> Measured:
    prompt_set, (ids, stops, *_), tokenizer = context.prompt_set, context.prompt_set.tokenized, context.eval_model.tokenizer
    seeds = [(settings.seed + i) % 2**32 for i in range(len(ids))]
    sampling = Sampling(settings.temperature, top_p=settings.top_p)
    options = AnswerOptions(GenerateOptions(sampling, stops), seeds=seeds)
    replies = answers(context.engine, tokenizer, ids, settings.max_new_tokens, options)
    texts = [x.text for x in replies]
    log_probs = prompt_set.judge.log_probs(texts, [int(x.tokens[-1]) in stops for x in replies])
    check_finite(log_probs, "the judge's log-probability of an answer")
    ids = prompt_set.judge.encode(texts)
    plain, adjusted = distinct(ids, prompt_set.judge.tokenizer.vocab_size)
    record = {"length": unit.length, "prompts": len(texts), "prompts_hash": prompt_set.hash, "judge": prompt_set.judge.hash}
    record |= {"log_prob": sum(log_probs) / len(texts), "tokens": sum(map(len, ids)) / len(texts)}
    record |= {"distinct": plain, "ead": adjusted, "log_probs": log_probs, "answers": texts}
    return measured_of_source(unit, [record | {"prompt_ends": [x[-PROMPT_END:] for x in prompt_set.texts]}])


def check_fits(context: EvalContext, settings: Settings, unit: Unit) -> None:
    """TooLongError where a prompt and its answer may be longer than the unit, or than a sequence of the judge's training."""
    where, size = context.prompt_set.tokenized.longest([*context.prompt_set.records])
    if size + settings.max_new_tokens > unit.length:
        sizes = f"{size:,} tokens of {where} and {settings.max_new_tokens:,} new ones do not fit into {unit.length:,}"
        raise TooLongError(f"{unit.eval} of {unit.part}: {sizes}; give larger --lengths or a smaller --max_new_tokens")
    context.prompt_set.judge.check_fits(settings.max_new_tokens)


def check_record(record: Mapping, where: str) -> None:
    sizes = {"prompts": record["prompts"]} | {name: len(record[name]) for name in ("log_probs", "answers", "prompt_ends")}
    check(len({*sizes.values()}) == 1, f"{where}: {', '.join(f'{n} {name}' for name, n in sizes.items())} are not equally many")
    plain, adjusted = len(record["distinct"]), len(record["ead"])
    check(plain == adjusted, f"{where}: {plain} numbers of distinct n-grams and {adjusted} of ead are not equally many")


EVALUATION = Evaluation(
    name="win_rate",
    parts=lambda context, settings: [] if context.prompt_set is None else [context.prompt_set.name],
    measure=measure,
    fields={
        **{"source": NAME, "length": SIZE, "prompts": SIZE, "prompts_hash": NAME, "judge": NAME},
        **{"log_prob": number(), "tokens": number(0)},
        **{"distinct": list_of(or_none(SHARE)), "ead": list_of(or_none(number(0)))},
        **{"log_probs": list_of(number(), 1), "answers": list_of(TEXT, 1), "prompt_ends": list_of(TEXT, 1)},
    },
    headline=Headline(
        lambda records: mean_of(records, "log_prob"), "win_rate_judge_nats", "judge {:.3f} nats a token", higher_is_better=True
    ),
    report=report_of("win_rate"),
    section_order=9,
    uses_engine=True,
    in_training=False,
    longest_alone=True,
    flags=("prompts", "judge", "max_new_tokens", "temperature", "top_p", "seed"),
    sequences=lambda settings, length: 1,
    empty=lambda context: ("prompts", "--prompts and --judge name none"),
    check_fits=check_fits,
    check_record=check_record,
)
