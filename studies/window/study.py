"""How the window of the local layers changes what the global layer recalls, with NoPE and with RoPE in the global layer."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_cells
from studies.probe import CONFIG, COPIES_FAR, COPY_METRICS, FARTHEST, LEARNED, METRICS, NEAR, SHOWN

GLOBALS = {"NoPE": "rnope_swa", "RoPE": "swa_rope"}
WINDOWS = (4, 16, 48)
STEPS = {"1x": 1000, "2x": 2000}  # tokens, as multiples of those of studies/layouts
ORDERS = (  # that are claimed: global layer, the better window, the worse one, and in what
    ("NoPE", 16, 48, "recalls less", FARTHEST),
    ("RoPE", 16, 48, "recalls less", FARTHEST),
    ("NoPE", 16, 48, "copies worse", COPIES_FAR),
    ("NoPE", 4, 16, "copies worse", COPIES_FAR),
)


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
        *(
            Claim(f"With a {layer} layer and {tokens} tokens, a window of {worse} {does} at 16 times the length "
                  f"than one of {better}.",
                  name(layer, better, tokens), name(layer, worse, tokens), metric)
            for layer, better, worse, does, metric in ORDERS
            for tokens in STEPS
        ),
    ),
    plot=Curves({"recall at 64": lines(NEAR), "recall at 1,024": lines(FARTHEST), "copying at 1,024": lines(COPIES_FAR)},
                "window", "right answers", "share"),
)  # fmt: skip
