"""What the studies on the recall probe share: lengths, metrics, and when a run has learned the task."""

from hybrid_attn.studies import SHARE, evaluated, stays_below

CONFIG = "studies/layouts/config.py"
LENGTHS = (64, 128, 256, 512, 1024)  # the training length and up to 16 times as long
RECALL = {n: f"recall at {n:,}" for n in LENGTHS}
NEAR, FARTHEST = RECALL[64], RECALL[1024]
APPEARS = "loss below 0.1 from step"
METRICS = {
    **{x: evaluated("recall", "accuracy", {"source": "probe", "length": n}, bounds=SHARE) for n, x in RECALL.items()},
    APPEARS: stays_below("loss_mean", 0.1),
}
LEARNED = NEAR, 0.95
