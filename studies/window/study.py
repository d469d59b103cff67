"""How the window of the local layers changes what the global layer recalls, with NoPE and with RoPE in the global layer."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_cells
from studies.probe import CONFIG, COPIES_FAR, COPY_METRICS, FARTHEST, LEARNED, METRICS, NEAR, SHOWN

GLOBALS = {"NoPE": "rnope_swa", "RoPE": "swa_rope"}
WINDOWS = (4, 16, 48)
STEPS = {"1x": 1000, "2x": 2000}  # tokens, as multiples of those of studies/layouts


def name(layer: str, window: int, tokens: str) -> str:
    return f"{layer}_{window}_{tokens}"


def cell(layer: str, window: int, tokens: str) -> Cell:
    return Cell(f"{CONFIG}:{GLOBALS[layer]}", {"model.kinds.L.window": window, "stages[0].steps": STEPS[tokens]})


def lines(metric: str) -> dict:
    """Of a metric: a line for each kind of global layer and number of tokens, over the windows."""
    return over_cells({f"{g}, {t} tokens": {str(w): name(g, w, t) for w in WINDOWS} for g in GLOBALS for t in STEPS}, metric)


STUDY = Study(
    title="The window of the local layers",
    question="Does a large window make the global layer lazy, or does a small one make the model weak?",
    cells={name(g, w, t): cell(g, w, t) for g in GLOBALS for t in STEPS for w in WINDOWS},
    metrics=METRICS | COPY_METRICS,
    table=SHOWN,
    learned=LEARNED,
    claims=(
        Claim("With a NoPE layer, a window of 4 learns less than one of 16.",
              name("NoPE", 16, "1x"), name("NoPE", 4, "1x"), NEAR),
        Claim("With a NoPE layer, a window of 48 recalls less at 16 times the length than one of 16.",
              name("NoPE", 16, "1x"), name("NoPE", 48, "1x"), FARTHEST),
        Claim("The same with twice the tokens.", name("NoPE", 16, "2x"), name("NoPE", 48, "2x"), FARTHEST),
        Claim("With a RoPE layer, a window of 48 recalls less at 16 times the length than one of 16.",
              name("RoPE", 16, "1x"), name("RoPE", 48, "1x"), FARTHEST),
        Claim("The same with twice the tokens.", name("RoPE", 16, "2x"), name("RoPE", 48, "2x"), FARTHEST),
        Claim("With a NoPE layer, a window of 48 copies worse at 16 times the length than one of 16.",
              name("NoPE", 16, "1x"), name("NoPE", 48, "1x"), COPIES_FAR),
        Claim("The same with twice the tokens.", name("NoPE", 16, "2x"), name("NoPE", 48, "2x"), COPIES_FAR),
        Claim("With a NoPE layer, a window of 16 copies worse at 16 times the length than one of 4.",
              name("NoPE", 4, "1x"), name("NoPE", 16, "1x"), COPIES_FAR),
        Claim("The same with twice the tokens.", name("NoPE", 4, "2x"), name("NoPE", 16, "2x"), COPIES_FAR),
    ),
    plot=Curves({"recall at 64": lines(NEAR), "recall at 1,024": lines(FARTHEST), "copying at 1,024": lines(COPIES_FAR)},
                "window", "right answers", "share"),
)  # fmt: skip
