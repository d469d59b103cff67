"""Objectives by the names that a stage's `objective` may have."""

from collections.abc import Sequence

from hybrid_attn.config import StageConfig
from hybrid_attn.data.packed import fields_of, has_stored_reference
from hybrid_attn.train.objectives.next_token import NEXT_TOKEN
from hybrid_attn.train.objectives.objective import Objective
from hybrid_attn.train.objectives.preference import PREFERENCE, with_stored_reference
from hybrid_attn.train.objectives.sft import SFT
from hybrid_attn.trees import check, choice

OBJECTIVES: dict[str, Objective] = {"next_token": NEXT_TOKEN, "sft": SFT} | PREFERENCE


def objective_of(config: StageConfig) -> Objective:
    """The objective of a stage; ValueError for one that is not in `OBJECTIVES`, or whose batch fields or settings are wrong."""
    name = config.objective
    objective = choice(f"stages[{config.index}].objective", name, OBJECTIVES)
    made = fields_of(config)
    missing = ", ".join(field for field in objective.fields if field not in made)
    check(not missing, f"the objective {name!r} needs the batch fields {missing}, and the data makes {', '.join(made)}")
    objective.check(config)
    return with_stored_reference(objective) if has_stored_reference(config) else objective


def check_pairs(config: StageConfig, others: Sequence[str]) -> None:
    """ValueError if the objective of a stage needs pairs, and the stage has sources without them (`others`)."""
    problem = f"stages[{config.index}].objective={config.objective!r} needs pairs, and these data.sources hold none: "
    cure = "make stores of pairs with tools/prepare_data.py --format=preference"
    check(not (objective_of(config).paired and others), f"{problem}{', '.join(sorted(others))}; {cure}")
