"""Objectives by the names that a stage's `objective` may have."""

from hybrid_attn.train.objectives.next_token import NEXT_TOKEN
from hybrid_attn.train.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {"next_token": NEXT_TOKEN}
