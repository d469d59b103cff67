"""References whose log-probabilities stand in the token stores: they must be those of the model that the stage begins with."""

import dataclasses
from collections.abc import Mapping

from hybrid_attn.checkpoint import INIT_FROM
from hybrid_attn.config import NO_ADAPTER, Config
from hybrid_attn.data.corpora import Corpus
from hybrid_attn.data.packed import has_stored_reference
from hybrid_attn.data.references import TOOL, References
from hybrid_attn.model import transforms
from hybrid_attn.stored import first_eight
from hybrid_attn.train import resume
from hybrid_attn.trees import check


def check_stages(c: Config) -> None:
    """ValueError for a stage with stored references that does not begin with the checkpoint of `init_from`."""
    for stage in c.each_stage:
        field = f"stages[{stage.index}].preference.reference='store'"
        if has_stored_reference(stage):
            begins = stage.index == 0 and c.init_from.path is not None
            cure = "give the stage a run of its own with init_from, or use reference='frozen'"
            check(begins, f"{field} is the model of a checkpoint, and the stage does not begin with one; {cure}")
            renamed = f"{field} and init_from.rename={c.init_from.rename}: the stage begins with another model"
            check(not c.init_from.rename, f"{renamed}; use reference='frozen'")


def read(c: Config, loaded: Mapping[str, Corpus], start: int) -> dict[str, References]:
    """Those that the steps after `start` read, by source; ValueError where they are missing or damaged."""
    if not has_stored_reference(c.at(0)) or start >= c.stages[0].steps:
        return {}
    return {name: loaded[name].training.references() for name in c.weights(0)}


def check_model(c: Config, references: Mapping[str, References], recorded: Mapping) -> None:
    """ValueError where the log-probabilities of a source are those of another model than the run began with.

    `recorded` has what `init_from.first_state` recorded of that.
    """
    if not references:
        return
    began, again = recorded.get(INIT_FROM), "start the run in another --workdir"
    check(began is not None, f"preference.reference='store', and this workdir began with no init_from.path; {again}")
    new = [name for name in began["new"] if not transforms.is_added(name)]
    use = "use reference='frozen'"
    check(not new, f"preference.reference='store' is the model of init_from, and {first_eight(new)} are new here; {use}")
    adapter = NO_ADAPTER if began["new"] else c.at(0).model.adapter  # a new adapter changes nothing yet
    function = resume.function_of(dataclasses.replace(c.at(0).model, adapter=adapter))
    for name, x in references.items():
        problem = f"data.sources.{name} has log-probabilities of {x.checkpoint}, fingerprint {x.fingerprint[:12]}"
        other = f"and the run began with {began['path']} step {began['step']}, fingerprint {began['fingerprint'][:12]}"
        cure = f"make them again with {TOOL} --store={c.data.sources[name].store} --checkpoint={began['path']}"
        check(x.fingerprint == began["fingerprint"], f"{problem}, {other}; {cure}")
        changed = f"{problem}, and the first stage has another config of the model than that checkpoint"
        check(x.function == function, f"{changed}; {use}, or the config of the checkpoint, or {cure}")
