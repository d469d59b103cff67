"""A dense model that becomes a part of a mixture of experts: the seed, or a branch that goes on from it in one domain.

    python launch/train.py --config=configs/upcycle/dense.py:tiny,seed --workdir=runs/seed
    python launch/train.py --config=configs/upcycle/dense.py:tiny,tables --config.init_from.path=runs/seed --workdir=runs/tables

A branch is one of DOMAINS: code and tables of Python's standard library, its documentation strings, or a synthetic language.
The seed is trained on those of SEED. tools/write_domains.py writes the last two. The sizes but tiny are those of BAM (arXiv
2408.08274, table 8), with its tokens and rates: name a tokenizer and sources of your own for them. docs/upcycling.md has the
whole chain.
"""

import sysconfig

from ml_collections import ConfigDict

from hybrid_attn.configs import base

LIBRARY, WRITTEN = sysconfig.get_path("stdlib"), "runs/domains"  # the default of tools/write_domains.py
DOMAINS = {
    "modules": f"{LIBRARY}/*.py",
    "tables": f"{LIBRARY}/encodings/*.py",
    "documentation": f"{WRITTEN}/documentation.jsonl",
    "language": f"{WRITTEN}/language.jsonl",
}
SEED = "modules", "tables", "documentation"
ADDED = "language"  # the domain that is added later
SIZES = {  # layers, width, feed-forward width, query heads, key/value heads, tied table, learning rate, its last ratio, warm-up
    "590m": (6, 1024, 2048, 8, 8, False, 1.2e-4, 0.1, 1500),  # gate and up side by side are the 4,096 of the paper
    "2b": (18, 2304, 9216, 18, 6, True, 1e-2, 0.03, 2000),
}
TOKENS = {  # of the seed, of a branch and of a mixture; of a step; of a sequence
    "tiny": (307_200, 153_600, 153_600, 2048, 512),
    "590m": (400 * 10**9, 100 * 10**9, 100 * 10**9, 2**20, 2048),
    "2b": (750 * 10**9, 100 * 10**9, 100 * 10**9, 2**22, 2048),
}


def split(argument: str, seconds: tuple[str, ...]) -> list[str]:
    """The size and what follows it; ValueError for others."""
    size, _, second = argument.partition(",")
    if size not in TOKENS or second not in seconds:
        raise ValueError(f"{argument!r}: write SIZE,NAME with a size of {', '.join(TOKENS)} and a name of {', '.join(seconds)}")
    return [size, second]


def of_size(c: ConfigDict, size: str) -> None:
    """Gives `c` the model and the optimiser of a size."""
    m = c.model
    if size == "tiny":
        m.pattern, m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.head_dim, m.d_ff = "LG", 2, 64, 4, 2, 16, 128
        m.init_std, m.kinds.L.window = 0.125, 64
        c.train.remat = "none"
        return
    m.pattern, m.head_dim, m.vocab_size, m.init_std = "R", 128, 256_000, 0.02
    m.kinds = ConfigDict({"R": base.kind(rope_theta=10_000.0)})
    m.num_layers, m.d_model, m.d_ff, m.num_heads, m.num_kv_heads, m.tie_embeddings, *rate = SIZES[size]
    c.optim.lr, c.optim.final_lr_ratio, c.optim.warmup_steps = rate
    c.mesh.data, c.mesh.fsdp = 1, -1


def training(c: ConfigDict, size: str, phase: int, sources: tuple[str, ...]) -> None:
    """Gives `c` the tokens of a phase (0 the seed, 1 a branch, 2 the mixture), from equal shares of sources."""
    tokens, of_step, length = TOKENS[size][phase], *TOKENS[size][3:]
    c.data.sources = ConfigDict({domain: base.source(paths=(DOMAINS[domain],)) for domain in sources})
    c.stages = [base.stage(steps=tokens // of_step, seq_len=length, batch=of_step // length)]
    c.stages[0].mixture = ConfigDict(dict.fromkeys(sources, 1.0))
    c.evals.names, c.evals.lengths = ("position",), (1.0,)
    if size == "tiny":
        c.evals.tokens = 32_768


def get_config(argument: str = "tiny,seed"):
    size, part = split(argument, ("seed", *DOMAINS))
    c = base.get_config()
    of_size(c, size)
    training(c, size, int(part != "seed"), SEED if part == "seed" else (part,))
    if part != "seed":
        c.optim.lr /= 2  # the rate of a branch rises to half of that of the seed
    return c
