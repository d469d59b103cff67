"""The layouts of "Rope to Nope and Back Again" (arXiv 2501.18795) on the recall probe, and windows with a RoPE layer."""

from hybrid_attn.studies import Cell, Claim, Curves, Reach, Study, over_metrics
from studies.probe import APPEARS, FARTHEST, LEARNED, METRICS, RECALL

LAYOUTS = ("rope", "qk_norm", "nope", "rnope", "rnope_swa", "swa_rope")
CELLS = {name: f"config.py:{name}" for name in LAYOUTS} | {"rnope_late_window": "config.py:rnope-64"}

STUDY = Study(
    title="Layouts on the recall probe, up to 16 times the training length",
    question="Which layouts recall pairs beyond the length of training, and which learn to recall first?",
    cells={name: Cell(config) for name, config in CELLS.items()},
    metrics=METRICS,
    learned=LEARNED,
    claims=(
        Reach("RNoPE-SWA keeps its recall at 16 times the training length.", "rnope_swa", FARTHEST, 0.95),
        Claim("With windows, NoPE in the global layer recalls more than RoPE.", "rnope_swa", "swa_rope", FARTHEST, True),
        Claim("RNoPE-SWA recalls more than RoPE in every layer.", "rnope_swa", "rope", FARTHEST, True),
        Claim("RNoPE-SWA recalls more than NoPE in every layer.", "rnope_swa", "nope", FARTHEST, True),
        Claim("Windows make RNoPE recall more.", "rnope_swa", "rnope", FARTHEST, True),
        Claim("QK-norm makes RoPE recall less.", "rope", "qk_norm", FARTHEST, True),
        Claim("Without windows, RNoPE recalls more than RoPE in every layer.", "rnope", "rope", FARTHEST, True),
        Claim("A window that RNoPE gets after training makes it recall more.", "rnope_late_window", "rnope", FARTHEST, True),
        Claim("RoPE in every layer learns sooner than NoPE.", "rope", "nope", APPEARS),
    ),
    plot=Curves({"": over_metrics(CELLS, RECALL)}, "tokens", "right answers", "share", (64,)),
)  # fmt: skip
