"""The table of evaluations, in the order in which a suite runs them. To add one, add its module."""

from hybrid_attn.evals import attention, harness, keytokens, languages, needle, position, preferences, recall, routing, win_rate
from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.ruler import evaluation as ruler

MODULES = (position, recall, needle, ruler, attention, keytokens, languages, routing, preferences, win_rate, harness)
EVALS: dict[str, Evaluation] = {module.EVALUATION.name: module.EVALUATION for module in MODULES}
