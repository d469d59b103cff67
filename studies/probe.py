"""What the studies on the recall probe share: lengths, metrics, and when a run has learned the task.

Hybrids that differ little recall all pairs at each of these lengths, but do not copy equally well. Among 511 letters each two
neighbours occur twice on average: to copy at 1,024 tokens a model has to compare three letters or more.
"""

from hybrid_attn.studies import SHARE, Metric, evaluated, stays_below

CONFIG = "studies/layouts/config.py"
LENGTHS = (64, 128, 256, 512, 1024)  # the training length and up to 16 times as long
RECALL = {n: f"recall at {n:,}" for n in LENGTHS}
NEAR, FARTHEST = RECALL[64], RECALL[1024]
APPEARS = "loss below 0.1 from step"
COPYING = {n: f"copying at {n:,}" for n in LENGTHS}
COPIES_FAR = COPYING[1024]


def right(source: str, length: int) -> Metric:
    """The share of right answers to the task of a source: `probe` is recall, `letters` is copying."""
    return evaluated("recall", "accuracy", {"source": source, "length": length}, bounds=SHARE)


METRICS = {x: right("probe", n) for n, x in RECALL.items()} | {APPEARS: stays_below("loss_mean", 0.1)}
COPY_METRICS = {x: right("letters", n) for n, x in COPYING.items()}
LEARNED = NEAR, 0.95
SHOWN = NEAR, FARTHEST, COPYING[64], COPIES_FAR, APPEARS
