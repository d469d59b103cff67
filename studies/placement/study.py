"""The place of the global layers, and their number at equal bytes of the KV cache of long sequences."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_metrics
from studies.probe import COPIES_FAR, COPY_METRICS, COPYING, FARTHEST, LEARNED, METRICS, RECALL, SHOWN

PLACES = {
    "last": "LLLGLLLG", "first": "GLLLGLLL", "clustered_last": "LLLLLLGG", "clustered_first": "GGLLLLLL",
    "clustered_middle": "LLLGGLLL", "ends": "GLLLLLLG",
}  # fmt: skip
# Global layers times key/value heads is 4, as in the cell `last`: the windows keep little beside it.
RATIOS = {"1to1": "LGLGLGLG-1", "7to1": "LLLLLLLG-4"}
CELLS = PLACES | RATIOS

STUDY = Study(
    title="Where the global layers stand",
    question="Should global layers come first or last, spread or clustered, and how many, at equal bytes of the KV cache?",
    cells={name: Cell(f"config.py:{layers}") for name, layers in CELLS.items()},
    metrics=METRICS | COPY_METRICS,
    table=SHOWN,
    learned=LEARNED,
    claims=(
        Claim("Global layers at the end of each period recall more than at its beginning.", "last", "first", FARTHEST),
        Claim("Spread global layers recall more than two at the end.", "last", "clustered_last", FARTHEST),
        Claim("Two at the end recall more than two at the beginning.", "clustered_last", "clustered_first", FARTHEST),
        Claim("3:1 recalls more than 1:1 at equal bytes.", "last", "1to1", FARTHEST),
        Claim("3:1 recalls more than 7:1 at equal bytes.", "last", "7to1", FARTHEST),
        Claim("Global layers at the end of each period copy better than at its beginning.", "last", "first", COPIES_FAR),
        Claim("Spread global layers copy better than two at the end.", "last", "clustered_last", COPIES_FAR),
        Claim("3:1 copies better than 1:1 at equal bytes.", "last", "1to1", COPIES_FAR),
        Claim("3:1 copies better than 7:1 at equal bytes.", "last", "7to1", COPIES_FAR),
    ),
    plot=Curves({"recall by place": over_metrics(PLACES, RECALL), "copying by place": over_metrics(PLACES, COPYING),
                 "copying by number": over_metrics(("last", *RATIOS), COPYING)},
                "tokens", "right answers", "share", (64,)),
)  # fmt: skip
