"""One of two processes that share four CPU devices: python tests/two_processes.py ADDRESS NUMBER OUT

OUT gets, for each mesh and step, what this process holds of the batch (NaN elsewhere), the sum of all tokens as the two
compute it together, and how many positions it read.
"""

import sys

import jax
import numpy as np

from configs import base
from hybrid_attn import config
from hybrid_attn.data import documents, pipeline
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.parallel.mesh import make_mesh

MESHES = ((2, 1, 1, 2, 1), (1, 1, 1, 4, 1), (1, 1, 2, 1, 2))  # the processes share sequences, positions, sequences
START = 2


def config_and_sequences():
    """A run of two stages on a mixture of two sources, and its sequences."""
    rng = np.random.default_rng(0)
    c = base.get_config()
    c.data.sources = {"a": base.source(), "b": base.source()}
    c.data.packing = "best_fit"
    c.data.prefetch = 1  # one thread, so that the steps are read in order
    mixture = {"a": 0.7, "b": 0.3}
    c.stages = [
        {"steps": 3, "seq_len": 16, "batch": 4, "microbatches": 1, "mixture": mixture},
        {"steps": 2, "seq_len": 64, "batch": 2, "microbatches": 1, "mixture": mixture},
    ]
    c = config.build(c)
    tokens = {name: [rng.integers(0, 256, n).astype(np.uint16) for n in rng.integers(3, 90, 20)] for name in "ab"}
    corpora = {name: documents.in_memory(x, range(len(x))) for name, x in tokens.items()}
    return c, pipeline.stage_sequences(c, corpora, load_tokenizer("bytes"))


def main(address: str, number: int, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, num_processes=2, process_id=number, initialization_timeout=120)
    c, sequences = config_and_sequences()
    arrays, read = {}, []
    for stage in sequences:
        stage.read = lambda slices, original=stage.read: read.append(slices) or original(slices)
    for sizes in MESHES:
        mesh = make_mesh(config.Mesh(1, *sizes))
        with jax.set_mesh(mesh):
            del read[:]
            for step, batch in pipeline.batches(c, sequences, [mesh] * len(c.stages), START):
                for name, array in batch.items():
                    held = arrays[f"{sizes}/{step}/{name}"] = np.full(array.shape, np.nan)
                    for shard in array.addressable_shards:
                        held[shard.index] = np.asarray(shard.data)
                arrays[f"{sizes}/{step}/sum"] = jax.device_get(jax.jit(lambda x: x.sum())(batch["tokens"]))
            sizes_read = [sum(stop - start for _, start, stop in slices) for slices in read]
            for step in range(START, c.total_steps):
                arrays[f"{sizes}/{step}/read"] = sizes_read[step - START]
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
