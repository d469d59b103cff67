"""The table of evaluations, in the order in which a suite runs them. To add one, add its record."""

from hybrid_attn.evals import attention, harness, keytokens, needle, position, recall
from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.ruler import evaluation as ruler

RECORDS = (
    position.EVALUATION,
    recall.EVALUATION,
    needle.EVALUATION,
    ruler.EVALUATION,
    attention.EVALUATION,
    keytokens.EVALUATION,
    harness.EVALUATION,
)
EVALS: dict[str, Evaluation] = {record.name: record for record in RECORDS}
