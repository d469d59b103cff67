"""Writes the log-probabilities of the pairs of a token store under a model, the reference of a later stage of preferences.

    python tools/prepare_references.py --store=data/pairs --checkpoint=runs/sft

They stand beside the store, with the fingerprint of the checkpoint: a run with preference(reference="store") that begins with
this checkpoint then holds no reference and computes none. Others that stand there are replaced. Exit codes: 2 for wrong input.
"""

from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from hybrid_attn import checkpoint, config, programs
from hybrid_attn.data import references, store
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.pipeline import heldout_batches
from hybrid_attn.infer import loading
from hybrid_attn.model import execution_on, losses
from hybrid_attn.model.documents import halves_of_pairs
from hybrid_attn.parallel.mesh import batch_shards, make_mesh
from hybrid_attn.train import resume
from hybrid_attn.trees import check

STORE = flags.DEFINE_string("store", None, "Directory of a token store of pairs.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or a directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.", 0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences that a device computes together.", 1)
TILE = 128  # tokens: a sequence has the fewest multiples that hold the longest pair


def log_probs_of(documents: Documents, loaded: loading.Loaded) -> np.ndarray:
    """The log-probability float32 [n] of each document, summed over its trained tokens, on the mesh in force."""
    c, mesh = loaded.config, jax.sharding.get_mesh()
    length = -(-int(documents.joint_lengths().max()) // TILE) * TILE
    sequences = PackedSequences(documents, length, None, loaded.tokenizer.byte_lengths)
    execution = execution_on(jax.default_backend(), c.model, c.train)

    @jax.jit
    def score(params, batch):
        nll_BT, _ = losses(c.model, params, batch, execution)
        return halves_of_pairs(-nll_BT * batch["weights"], batch["segments"])

    batch_size, values = BATCH_SIZE.value * batch_shards(mesh), np.zeros(len(documents), np.float32)
    indices = iter(sequences.spread(len(sequences)))
    for batch in heldout_batches(sequences, len(sequences), batch_size, mesh):
        halves_BP2 = np.stack(jax.device_get(score(loaded.params, batch)), axis=-1)
        for of_pairs_P2, index in zip(halves_BP2, indices, strict=False):  # the last rows may be padding
            numbers = sequences.documents_of(index)
            values[numbers] = of_pairs_P2.reshape(-1)[: len(numbers)]
    return values


def prepare() -> None:
    check("://" not in STORE.value, f"--store={STORE.value} is no directory; mount the bucket, and name the directory there")
    folder, directory = Path(STORE.value), loading.find(CHECKPOINT.value)
    step, manifest = loading.step_of(directory, STEP.value), store.read_manifest(STORE.value)
    check(manifest.pairs, f"{folder} holds no pairs; make it with tools/prepare_data.py --format=preference")
    mesh = config.Mesh(slice=1, data=-1, fsdp=1, expert=1, context=1, tensor=1)
    with jax.set_mesh(make_mesh(mesh)):
        loaded = loading.load(directory, step)
        documents = store.load(STORE.value, loaded.tokenizer)
        values = log_probs_of(documents, loaded)
    name = loading.name_of(directory, step)
    check(np.isfinite(values).all(), f"{name} gives log-probabilities that are not finite; use another checkpoint")
    function = resume.function_of(loaded.config.model)
    made = references.References(values, checkpoint.fingerprint(directory, step), name, function)
    references.write(folder, made, manifest.identity)
    print(f"references   {folder}: {len(values) // 2:,} pairs under {name}, fingerprint {made.fingerprint[:12]}")


def main(argv):
    programs.run(prepare, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
