"""Full attention with RoPE, or the hybrid, on text with some needles, then on a short mix of both at 8,192 tokens.

    python launch/train.py --config=studies/text/config.py:hybrid        # the standard library; half an hour on one core
    python launch/train.py --config=studies/text/config.py:rope-150m     # the bytes of the token store runs/text; one GPU

Layers, widths and windows are those of configs/rope_8k.py and configs/hybrid_8k.py. Both layouts have the same sequences.
"""

from ml_collections import ConfigDict

from configs import hybrid_8k, rope_8k
from hybrid_attn.configs import base

LAYOUTS = {"rope": rope_8k, "hybrid": hybrid_8k}
STORE = "runs/text"  # of tools/prepare_data.py, which the large size reads
PAIRS = 4  # needles in a document, at most


def get_config(argument: str = "hybrid"):
    """LAYOUT, or LAYOUT-150m."""
    layout, _, size = argument.partition("-")
    if layout not in LAYOUTS or size not in ("", "150m"):
        raise ValueError(f"config.py:{argument}: write rope, hybrid, rope-150m or hybrid-150m")
    c = LAYOUTS[layout].get_config(size or "small")
    c.data.sources["needles"] = base.source(task="needle", pairs=PAIRS)
    (large if size else small)(c)
    c.train.sinks = ()
    c.evals.names = ("position", "recall", "needle", "attention_mass")
    c.evals.lengths = (1.0, 2.0, 4.0)
    return c


def small(c: ConfigDict) -> None:
    """737,984 parameters: 1.2 M tokens of letters, 3.1 M in sequences of 2,048, and 1.6 M in those of 8,192."""
    c.data.sources["letters"], c.data.sources["pairs"] = base.source(task="copy"), base.source(task="recall")
    c.optim.optimiser, rate = "muon", 1e-2  # as in studies/layouts; on this text it is far ahead of AdamW at equal tokens
    c.stages = [
        stage("letters", 600, 64, 32, {"letters": 0.5, "pairs": 0.5}, start=rate, end=rate, warmup_steps=20),
        stage("text", 1500, 2048, 1, {"text": 0.7, "needles": 0.3}, end=rate / 5),
        stage("needles", 200, 8192, 1, {"text": 0.5, "needles": 0.5}, end=rate / 100),
    ]
    if "L" in c.model.kinds:  # what is copied lies outside this window, so that the global layer learns to look for it
        c.stages[0].override = base.override({"model.kinds.L.window": 16})
    c.train.log_every = 50
    c.evals.tokens = 131_072
    c.evals.samples = 2


def large(c: ConfigDict) -> None:
    """148 M parameters, 0.94 B tokens of bytes: 1.4e18 FLOPs, an hour at 40% of the peak of an H100."""
    c.model.vocab_size = 384  # bytes, for needles are written in them
    c.model.num_layers, c.model.d_ff = 16, 3328  # in place of the parameters of a larger vocabulary
    for source in c.data.sources.values():
        source.store = STORE
    c.train.remat = "none"
    rate = c.optim.lr
    c.stages = [
        stage("text", 1600, 8192, 64, {"text": 0.95, "needles": 0.05}, start=rate, end=rate / 5, warmup_steps=100),
        stage("needles", 200, 8192, 64, {"text": 0.5, "needles": 0.5}, end=rate / 100),
    ]
    for x in c.stages:
        x.microbatches = 16
    c.train.checkpoint_every = 200
    c.evals.tokens = 2_097_152
    c.evals.samples = 20


def stage(name: str, steps: int, seq_len: int, batch: int, mixture: dict[str, float], **rates) -> ConfigDict:
    """A stage of so many sequences a step, with a share of each source; its rate falls linearly."""
    schedule = base.lr_schedule(**rates)
    shares = ConfigDict(mixture)
    return base.stage(name=name, steps=steps, seq_len=seq_len, batch=batch, mixture=shares, lr_schedule=schedule)
