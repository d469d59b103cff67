"""The layouts of "Rope to Nope and Back Again" (arXiv 2501.18795) on the recall probe, and windows with a RoPE layer."""

from hybrid_attn.studies import SHARE, Cell, Claim, Curves, Reach, Study, evaluated, over_metrics, stays_below

LAYOUTS = ("rope", "qk_norm", "nope", "rnope", "rnope_swa", "swa_rope")
RECALL = {n: f"recall at {n:,}" for n in (64, 128, 256, 512, 1024)}
FARTHEST = RECALL[1024]

STUDY = Study(
    title="Layouts on the recall probe, up to 16 times the training length",
    question="Which layouts recall pairs beyond the length of training, and which learn to recall first?",
    cells={name: Cell(f"config.py:{name}") for name in LAYOUTS},
    metrics={
        **{x: evaluated("recall", "accuracy", {"source": "probe", "length": n}, bounds=SHARE) for n, x in RECALL.items()},
        "loss below 0.1 from step": stays_below("loss_mean", 0.1),
    },
    learned=(RECALL[64], 0.95),
    claims=(
        Reach("RNoPE-SWA keeps its recall at 16 times the training length.", "rnope_swa", FARTHEST, 0.95),
        Claim("With windows, NoPE in the global layer recalls more than RoPE.", "rnope_swa", "swa_rope", FARTHEST, True),
        Claim("RNoPE-SWA recalls more than RoPE in every layer.", "rnope_swa", "rope", FARTHEST, True),
        Claim("RNoPE-SWA recalls more than NoPE in every layer.", "rnope_swa", "nope", FARTHEST, True),
        Claim("Windows make RNoPE recall more.", "rnope_swa", "rnope", FARTHEST, True),
        Claim("QK-norm makes RoPE recall less.", "rope", "qk_norm", FARTHEST, True),
        Claim("Without windows, RNoPE recalls more than RoPE in every layer.", "rnope", "rope", FARTHEST, True),
        Claim("RoPE in every layer learns sooner than NoPE.", "rope", "nope", "loss below 0.1 from step"),
    ),
    plot=Curves({"": over_metrics(LAYOUTS, RECALL)}, "tokens", "right answers", "share", (64,)),
    seeds=3,
)  # fmt: skip
