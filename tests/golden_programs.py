"""Makes tests/golden_programs.json: what small compiled programs cost, as XLA counts it, and nothing that a clock says.

    python tests/golden_programs.py --out=tests/golden_programs.json

A change that makes a program dearer, or cheaper, by more than 2% writes the file again and says why. The file keeps the numbers
of other versions of jax: run it with each version that CI has. XLA counts the body of a loop once.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.bench import measurement
from hybrid_attn.config import Config
from hybrid_attn.infer import cache as caches
from hybrid_attn.infer import steps
from hybrid_attn.infer.sampling import GREEDY
from hybrid_attn.model import abstract_params, execution_on
from hybrid_attn.model.transformer import unstacked
from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT
from hybrid_attn.train.step import abstract_state, make_step

S, WINDOW, CHUNK = 2048, 512, 256
SIZES = {"num_layers": 4, "d_model": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "d_ff": 144}
HYBRID = {f"model.{key}": value for key, value in SIZES.items()} | {
    "stages": [{"steps": 5, "seq_len": S, "batch": 1, "microbatches": 1, "mixture": {}}],
    "train.remat": "none",
    "train.kernel": "blocked",  # XLA does not count what a custom call does
}


def hybrid() -> Config:
    return conftest.tiny(HYBRID | {"model.pattern": "LLLG"}, L={"window": WINDOW, "rope_theta": 10_000.0}, G={"qk_norm": "rms"})


def step(c: Config) -> jax.stages.Lowered:
    mesh = jax.sharding.get_mesh()
    batch = {
        name: jax.ShapeDtypeStruct((1, S), dtype, sharding=NamedSharding(mesh, TOKENS_BT))
        for name, dtype in dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32).items()
    } | {
        name: jax.ShapeDtypeStruct((1, S), jnp.float32, sharding=NamedSharding(mesh, TOKENS_BT))
        for name in ("weights", "bytes")
    }
    return make_step(c.at(0), execution_on("cpu", c.model, c.train)).lower(abstract_state(c, mesh), batch)


def attention(window: int | None, backward: bool) -> jax.stages.Lowered:
    """The kernel that runs on every CPU, with grouped heads."""
    kernel, options = kernels.KERNELS["blocked"], kernels.AttentionOptions(window, 0.125)
    q, kv = (jax.ShapeDtypeStruct((1, S, heads, 64), jnp.float32) for heads in (4, 2))
    ids, lse = jax.ShapeDtypeStruct((1, S), jnp.int32), jax.ShapeDtypeStruct((1, S, 4), jnp.float32)
    arguments = kernels.Queries(q, ids, ids), kernels.Keys(kv, kv, ids, ids)
    if not backward:
        return jax.jit(kernel.forward, static_argnums=0).lower(options, *arguments)
    return jax.jit(kernel.backward, static_argnums=0).lower(options, *arguments, (q, lse), (q, lse))


def inference(c: Config) -> tuple[steps.StepConfig, dict, steps.DecodeState]:
    """What a step of inference gets: a cache of S slots, of which chunks of `CHUNK` are read."""
    execution = execution_on("cpu", c.model, c.train)
    weights = jax.eval_shape(lambda: unstacked(c.model, abstract_zeros(abstract_params(c.model)), execution.dtype))
    cache = jax.eval_shape(lambda: caches.empty(c.model, 1, S, CHUNK, execution.dtype, False))
    last_BD = jax.ShapeDtypeStruct((1, c.model.d_model), execution.dtype, sharding=sharding(P(BATCH, None)))
    return steps.StepConfig(c.model, execution, CHUNK), weights, steps.DecodeState(cache, last_BD)


def abstract_zeros(shapes: dict) -> dict:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)


def sharding(spec: P) -> NamedSharding:
    return NamedSharding(jax.sharding.get_mesh(), spec)


def prefill(c: Config) -> jax.stages.Lowered:
    config, weights, state = inference(c)
    tokens_BT = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32, sharding=sharding(TOKENS_BT))
    counts_B = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=sharding(P(BATCH)))
    return steps.prefill.lower(config, False, weights, state, tokens_BT, counts_B)


def decode(c: Config) -> jax.stages.Lowered:
    config, weights, state = inference(c)
    done_B, seeds_B = (jax.ShapeDtypeStruct((1,), dtype, sharding=sharding(P(BATCH))) for dtype in (bool, jnp.uint32))
    part = steps.DecodeSlice(done_B, seeds_B, np.full(1, -1, np.int32), np.int32(0), np.int32(1))
    return steps.decode.lower(config, GREEDY, weights, state, part)


PROGRAMS: dict[str, Callable[[], jax.stages.Lowered]] = {
    "step of the hybrid": lambda: step(hybrid()),
    "step of full attention": lambda: step(measurement.full_attention(hybrid())),
    "attention forward, local": lambda: attention(WINDOW, False),
    "attention backward, local": lambda: attention(WINDOW, True),
    "attention forward, global": lambda: attention(None, False),
    "attention backward, global": lambda: attention(None, True),
    "prefill of a chunk": lambda: prefill(hybrid()),
    "decode of a token": lambda: decode(hybrid()),
}


def version() -> str:
    """The minor version of jax."""
    return ".".join(jax.__version__.split(".")[:2])


def costs(name: str) -> dict[str, int]:
    """FLOPs, bytes read and written, and bytes of temporaries of a program, optimised as a user's is."""
    with jax.set_mesh(conftest.mesh_of()):
        program = conftest.optimised(PROGRAMS[name]())
    counted = program.cost_analysis()
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"flops": int(counted["flops"]), "bytes": int(counted["bytes accessed"]), "temporaries": temporaries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="File to write; it keeps the numbers of other versions of jax.")
    options = parser.parse_args()
    golden = json.loads(options.out.read_text()) if options.out.exists() else {}
    golden[version()] = {name: costs(name) for name in PROGRAMS}
    options.out.write_text(json.dumps(dict(sorted(golden.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
