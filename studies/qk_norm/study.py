"""QK-norm by layer type, with and without weights, and temperatures of the NoPE layer."""

from hybrid_attn.studies import Cell, Claim, Curves, Study, over_cells
from studies.probe import CONFIG, COPIES_FAR, COPY_METRICS, FARTHEST, LEARNED, METRICS, SHOWN

BASE = f"{CONFIG}:rnope_swa"
NORMED = {"none": "", "local": "L", "global": "G", "all": "LG"}  # layer types with QK-norm
WEIGHTS = {"weight": "rms", "weightless": "rms_weightless"}
# The training length is the offset of log_length, and s log n begins at 1 there, as without a temperature.
TEMPERATURES = {"none": {}, "log_length": {"length": 64}, "learned": {"scale": 0.24}}


def name(where: str, weight: str, temperature: str) -> str:
    return "_".join([where, *([weight] if where != "none" else []), temperature])


def cell(where: str, weight: str, temperature: str) -> Cell:
    changes = {f"model.kinds.{letter}.qk_norm": WEIGHTS[weight] for letter in NORMED[where]}
    settings = {"type": temperature} | TEMPERATURES[temperature]
    return Cell(BASE, changes | {f"model.kinds.G.temperature.{key}": x for key, x in settings.items()})


COMBINATIONS = [
    (where, weight, temperature)
    for temperature in TEMPERATURES
    for where in NORMED
    for weight in WEIGHTS
    if (where != "none" or weight == "weight") and (where in ("none", "global") or temperature == "none")
]
CELLS = {name(*x): cell(*x) for x in COMBINATIONS}


def lines(metric: str, weight: str) -> dict:
    """Of a metric: a line for each temperature, over the layer types with QK-norm."""
    names = {t: {where: name(where, weight, t) for where in NORMED} for t in TEMPERATURES}
    return over_cells({t: {where: x for where, x in of.items() if x in CELLS} for t, of in names.items()}, metric)


STUDY = Study(
    title="QK-norm and temperature of NoPE layers",
    question="Does QK-norm in NoPE layers help or hurt, has it a weight, and does a temperature mend what it hurts?",
    cells=CELLS,
    metrics=METRICS | COPY_METRICS,
    table=SHOWN,
    learned=LEARNED,
    claims=(
        Claim("QK-norm with a weight in the NoPE layer makes it recall less.",
              "none_none", "global_weight_none", FARTHEST, True),
        Claim("QK-norm without a weight in the NoPE layer makes it recall less.",
              "none_none", "global_weightless_none", FARTHEST, True),
        Claim("With QK-norm in the NoPE layer, a weight makes it recall more.",
              "global_weight_none", "global_weightless_none", FARTHEST, True),
        Claim("QK-norm in the local layers makes it recall less.", "none_none", "local_weight_none", FARTHEST, True),
        Claim("With weightless QK-norm in the NoPE layer, log_length makes it recall more.",
              "global_weightless_log_length", "global_weightless_none", FARTHEST, True),
        Claim("With weightless QK-norm in the NoPE layer, a learned temperature makes it recall more.",
              "global_weightless_learned", "global_weightless_none", FARTHEST, True),
        Claim("QK-norm with a weight in the NoPE layer makes it copy worse.",
              "none_none", "global_weight_none", COPIES_FAR, True),
        Claim("QK-norm without a weight in the NoPE layer makes it copy worse.",
              "none_none", "global_weightless_none", COPIES_FAR, True),
        Claim("QK-norm in the local layers makes it copy worse.", "none_none", "local_weight_none", COPIES_FAR, True),
        Claim("Without QK-norm, log_length makes the NoPE layer copy better.",
              "none_log_length", "none_none", COPIES_FAR, True),
    ),
    plot=Curves({f"{weight}, {name}": lines(metric, weight) for name, metric in (("recall", FARTHEST), ("copying", COPIES_FAR))
                 for weight in WEIGHTS}, "QK-norm in layers", "right answers at 1,024 tokens", "share"),
)  # fmt: skip
