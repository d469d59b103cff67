"""Learned sinks, output gates, or neither, in all layers, by the window of the local layers."""

from statistics import fmean

from hybrid_attn.studies import SHARE, Cell, Claim, Curves, Metric, Study, Trained, evaluations, over_cells
from studies.probe import CONFIG, COPIES_FAR, COPY_METRICS, FARTHEST, LEARNED, METRICS, NEAR, SHOWN

BASE = f"{CONFIG}:rnope_swa"
WINDOWS = (4, 16)
KINDS = {"neither": {}, "sink": {"sink": True}, "gate": {"gate": "head"}}
MASS = {n: f"first token at {n:,}" for n in (64, 1024)}


def first_token(length: int) -> Metric:
    """The share of the NoPE layer's attention that its heads give to the first token, on average."""

    def read(run: Trained) -> float:
        lines = [x for x in evaluations(run.workdir) if x.get("eval") == "attention_mass" and x["step"] == run.step]
        return fmean(x["sink_rate"] for x in lines if x["kind"] == "G" and x["length"] == length)

    return Metric(read, bounds=SHARE, higher_is_better=False)


def cell(kind: str, window: int) -> Cell:
    changes = {f"model.kinds.{letter}.{key}": x for letter in "LG" for key, x in KINDS[kind].items()}
    return Cell(BASE, changes | {"model.kinds.L.window": window})


def lines(metric: str) -> dict:
    """Of a metric: a line for sinks, gates and neither, over the windows."""
    return over_cells({kind: {str(w): f"{kind}_{w}" for w in WINDOWS} for kind in KINDS}, metric)


STUDY = Study(
    title="Sinks, gates, or neither",
    question="Do a learned sink or a gate on the output of attention help, and do they take attention off the first token?",
    cells={f"{kind}_{w}": cell(kind, w) for kind in KINDS for w in WINDOWS},
    changes={"evals.names": ("recall", "attention_mass")},
    metrics=METRICS | COPY_METRICS | {x: first_token(n) for n, x in MASS.items()},
    table=(*SHOWN, *MASS.values()),
    learned=LEARNED,
    claims=(
        Claim("With a window of 16, a sink recalls more than neither.", "sink_16", "neither_16", FARTHEST, True),
        Claim("With a window of 16, a gate recalls more than neither.", "gate_16", "neither_16", FARTHEST, True),
        Claim("With a window of 16, a sink copies better than neither.", "sink_16", "neither_16", COPIES_FAR, True),
        Claim("With a window of 16, a gate copies better than neither.", "gate_16", "neither_16", COPIES_FAR, True),
        Claim("A sink takes attention off the first token.", "sink_16", "neither_16", MASS[1024], True),
        Claim("A gate takes attention off the first token.", "gate_16", "neither_16", MASS[1024], True),
        Claim("With a window of 4, a sink helps the model to learn.", "sink_4", "neither_4", NEAR),
        Claim("With a window of 4, a gate helps the model to learn.", "gate_4", "neither_4", NEAR),
    ),
    plot=Curves({"recall": lines(FARTHEST), "copying": lines(COPIES_FAR), "attention to token 0": lines(MASS[1024])},
                "window", "share at 1,024 tokens", "share"),
)  # fmt: skip
