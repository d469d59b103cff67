"""Where the positions of a hybrid come from: RoPE in windows, RoPE of part of a head, a short convolution, or nothing."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_metrics
from studies.probe import APPEARS, CONFIG, COPIES_FAR, COPY_METRICS, COPYING, FARTHEST, LEARNED, METRICS, NEAR, RECALL, SHOWN

BASE = f"{CONFIG}:rnope_swa"
NO_ROPE = {"model.kinds.L.rope_theta": None}
# What differs in the local layers; the global layer has NoPE in all.
CELLS = {
    "rope": {},
    "partial_rope": {"model.kinds.L.rope_fraction": 0.25},
    "conv": NO_ROPE | {"model.kinds.L.short_conv": 4},
    "rope_and_conv": {"model.kinds.L.short_conv": 4},
    "none": NO_ROPE,
    "none_full": NO_ROPE | {"model.kinds.L.window": None},
}

STUDY = Study(
    title="Where positions come from",
    question="Does a hybrid need RoPE in its windows, or does a short convolution, or the edge of the window, do as well?",
    cells={name: Cell(BASE, changes) for name, changes in CELLS.items()},
    metrics=METRICS | COPY_METRICS,
    table=SHOWN,
    learned=LEARNED,
    claims=(
        Claim("RoPE in windows learns more than no positions there.", "rope", "none", NEAR),
        Claim("A short convolution learns more than no positions.", "conv", "none", NEAR),
        Claim("RoPE recalls more at 16 times the length than a short convolution.", "rope", "conv", FARTHEST, True),
        Claim("RoPE copies better at 16 times the length than a short convolution.", "rope", "conv", COPIES_FAR, True),
        Claim("RoPE copies better there than no positions.", "rope", "none", COPIES_FAR, True),
        Claim("A short convolution beside RoPE learns sooner than RoPE alone.", "rope_and_conv", "rope", APPEARS),
        Claim("Windows give positions: without RoPE they learn more than full attention does.", "none", "none_full", NEAR),
        Claim("RoPE of a quarter of each head recalls less than RoPE of all.", "rope", "partial_rope", FARTHEST, True),
    ),
    plot=Curves({"recall": over_metrics(CELLS, RECALL), "copying": over_metrics(CELLS, COPYING)},
                "tokens", "right answers", "share", (64,)),
)  # fmt: skip
