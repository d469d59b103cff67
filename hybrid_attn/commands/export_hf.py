"""Exports a checkpoint to a Hugging Face directory: python tools/export_hf.py --checkpoint=DIR --out=DIR

--checkpoint is the workdir of a run, or a directory of checkpoints such as tools/import_hf.py writes. The family is --family,
or that of the imported config.json, or the first that can express the model. The weights of an adapter are merged, and
factors of low rank multiplied. The chat template of the training becomes chat_template.jinja.
--evaluation writes a model card, README.md, of an evaluation of this checkpoint: the stages of the training and its tables.
Where the training began with another model, --base_model is the id on the Hub for the card; it need not be given for a model
that was imported from the Hub's cache.
--peft writes the adapter alone instead, as PEFT stores LoRA.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from hybrid_attn import checkpoint, programs
from hybrid_attn.config import CheckpointConfig
from hybrid_attn.convert import families, hf, peft
from hybrid_attn.data import chat
from hybrid_attn.files import IMPORTED_FILES
from hybrid_attn.infer import loading
from hybrid_attn.infer.merged import Merged, of_matrices
from hybrid_attn.trees import check

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
OUT = flags.DEFINE_string("out", None, "New directory.", required=True)
FAMILY = flags.DEFINE_enum("family", None, sorted(families.FAMILIES), "The model_type of config.json.")
PEFT = flags.DEFINE_bool("peft", False, "Write the LoRA alone, in float32 and in the format of PEFT.")
EVALUATION = flags.DEFINE_string("evaluation", None, "Evaluation that a model card tells of, such as runs/a/evals/300.")
BASE_MODEL = flags.DEFINE_string("base_model", None, "Id on the Hub of what the training began with, for the card: OWNER/NAME.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the tensors.")


CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
IN_HUB_CACHE = re.compile(r"models--([^/]+)/snapshots/")  # -- in place of / of the id


def began_with(data: Mapping) -> str | None:
    """What a run or an import began with, by the data state of a checkpoint; None for random parameters."""
    if checkpoint.INIT_FROM not in data:
        return data.get("imported")
    directory, step = data[checkpoint.INIT_FROM]["path"], data[checkpoint.INIT_FROM]["step"]
    try:
        there = checkpoint.read_data(directory, step) if step == 0 else {}
    except checkpoint.UnreadableError:  # deleted since
        there = {}
    return there.get("imported", loading.name_of(directory, step))


def without_folders(text: str) -> str:
    """The last name of a path that stands at the end, without the directories of this machine."""
    before, space, path = text.rpartition(" ")
    parts = [part for part in Path(path).parts if part != "checkpoints"]
    return f"{before}{space}{parts[-1]}" if parts else text


def model_card(directory: str, c: CheckpointConfig, step: int) -> str:
    """The card of the checkpoint of `step`; ValueError where --evaluation is of another."""
    from hybrid_attn.evals import report  # which takes a second, and matplotlib
    from hybrid_attn.evals.report import card

    run, name = report.read(Path(EVALUATION.value)), Path(OUT.value).resolve().name
    card.check_is_of(run, c, step, f"--evaluation={EVALUATION.value}")
    base, origin = began_with(checkpoint.read_data(directory, step)), None
    if base is not None or BASE_MODEL.value is not None:
        cached = IN_HUB_CACHE.search(base or "")
        hub_id = BASE_MODEL.value or (cached[1].replace("--", "/") if cached else None)
        origin = card.Origin(hub_id or without_folders(base), hub_id)
    return card.card(name, run, c, step, origin)


def check_flags() -> None:
    """ValueError for flags that contradict each other."""
    check(
        EVALUATION.value is None or not PEFT.value,
        "--evaluation is of the model, and --peft writes an adapter alone; leave one out",
    )
    if BASE_MODEL.value is not None:
        check(
            EVALUATION.value is not None, "--base_model is for the model card, which --evaluation writes; give both, or neither"
        )
        is_id = HUB_ID.fullmatch(BASE_MODEL.value) is not None
        check(is_id, f"--base_model={BASE_MODEL.value} is no id of a model on the Hub; write OWNER/NAME")


def export_model() -> None:
    hf.library()  # fails before anything is read
    check_flags()
    directory = loading.find(CHECKPOINT.value)
    step = loading.step_of(directory, STEP.value)
    saved = loading.saved_of(directory, step)
    c = saved.config
    files = Path(directory) / IMPORTED_FILES
    model, parameters = of_matrices(c.model), Merged(directory, step, c.model)
    type = c.model.adapter.type
    check(not PEFT.value or type == "lora", f"--peft writes LoRA, and the checkpoint has model.adapter.type={type!r}")
    described = hf.describe(model, files, max(stage.seq_len for stage in c.stages), FAMILY.value)
    text = None if EVALUATION.value is None else model_card(directory, c, step)
    if PEFT.value:
        with hf.new_directory(OUT.value) as new:
            peft.write(new, c.model, described["model_type"], parameters.targets(), parameters.added)
        print(f"{OUT.value}: LoRA of {described['architectures'][0]}, with {peft.CONFIG}, {peft.TENSORS}")
        return
    with hf.new_directory(OUT.value) as new:
        hf.write(new, model, described, parameters.shapes, parameters.slices, DTYPE.value)
        others = hf.copy_files(files, new, without=("config.json",))
        if saved.chat_template is not None:  # goes before that of an imported model, as in a chat with the checkpoint
            (new / chat.BESIDE).write_text(saved.chat_template, encoding="utf-8", newline="")
            others = sorted({*others, chat.BESIDE})
        if text is not None:
            (new / CARD).write_text(text, encoding="utf-8")
            others = [*others, CARD]
    print(f"{OUT.value}: {described['architectures'][0]} in {DTYPE.value}, with {', '.join(['config.json', *others])}")


def main(argv):
    programs.run(export_model, argv)


start = functools.partial(programs.start, main, __name__)  # the console script
