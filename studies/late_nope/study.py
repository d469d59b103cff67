"""RoPE in the global layers from the start, dropped late, or never: configs/drope.py asks the same of text."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_cells
from studies.probe import COPY_METRICS, FARTHEST, LEARNED, METRICS, NEAR, SHOWN

LAYOUTS = "swa_rope", "rope"
SHARES = {"0%": 0.0, "50%": 0.5, "80%": 0.8, "95%": 0.95, "never": 1.0}  # of the steps before RoPE is dropped
NAMES = {layout: {x: f"{layout}_{x.rstrip('%')}" for x in SHARES} for layout in LAYOUTS}
HYBRID, FULL = NAMES["swa_rope"], NAMES["rope"]

STUDY = Study(
    title="NoPE from the start, or RoPE that is dropped late",
    question="Is it better to train layers without positions from the first step, or to drop RoPE late?",
    cells={names[x]: Cell(f"config.py:{layout}-{share}") for layout, names in NAMES.items() for x, share in SHARES.items()},
    metrics=METRICS | COPY_METRICS,
    table=SHOWN,
    learned=LEARNED,
    claims=(
        Claim("In the hybrid, dropping RoPE after 80% recalls more at 16 times the length than keeping it.",
              HYBRID["80%"], HYBRID["never"], FARTHEST),
        Claim("In the hybrid, NoPE from the start recalls more there than RoPE that is dropped after 80%.",
              HYBRID["0%"], HYBRID["80%"], FARTHEST),
        Claim("In the hybrid, dropping it after 95% is too late: 80% recalls more.", HYBRID["80%"], HYBRID["95%"], FARTHEST),
        Claim("With full attention, dropping RoPE after 80% recalls more there than keeping it.",
              FULL["80%"], FULL["never"], FARTHEST),
        Claim("With full attention, dropping RoPE after 80% recalls more there than NoPE from the start.",
              FULL["80%"], FULL["0%"], FARTHEST),
    ),
    plot=Curves({"64 tokens": over_cells(NAMES, NEAR), "1,024 tokens": over_cells(NAMES, FARTHEST)},
                "steps with RoPE", "right answers", "share"),
)  # fmt: skip
