"""References whose log-probabilities stand in the token stores: they must be those of the model that the stage begins with."""

from collections.abc import Mapping

from hybrid_attn.config import Config
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.data.packed import has_stored_reference
from hybrid_attn.data.references import TOOL
from hybrid_attn.trees import check


def check_stages(c: Config) -> None:
    """ValueError for a stage with stored references that does not begin with the checkpoint of `init_from`."""
    for stage in c.each_stage:
        field = f"stages[{stage.index}].preference.reference='store'"
        if has_stored_reference(stage):
            begins = stage.index == 0 and c.init_from.path is not None
            cure = "give the stage a run of its own with init_from, or use reference='frozen'"
            check(begins, f"{field} is the model of a checkpoint, and the stage does not begin with one; {cure}")


def check_fingerprints(c: Config, loaded: Mapping[str, Corpus], recorded: Mapping) -> None:
    """ValueError where the log-probabilities of a source are those of another model than the run began with."""
    for name in c.weights(0) if has_stored_reference(c.at(0)) else ():
        references, began = loaded[name].training.references(), recorded["init_from"]
        problem = (
            f"data.sources.{name} has log-probabilities of {references.checkpoint}, fingerprint {references.fingerprint[:12]}"
        )
        other = f"and the run began with {began['path']} step {began['step']}, fingerprint {began['fingerprint'][:12]}"
        cure = f"make them again with {TOOL} --store={c.data.sources[name].store} --checkpoint={began['path']}"
        check(references.fingerprint == began["fingerprint"], f"{problem}, {other}; {cure}")
