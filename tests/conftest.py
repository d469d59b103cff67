"""Eight CPU devices, and helpers that tests share: tiny configs, packed sequences, random parameters.

TEST_PLATFORM names another platform, for tests/test_device.py.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import math
import os
import string
import struct
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding
from tensorboardX.proto import event_pb2

from configs import base
from hybrid_attn import checkpoint, config
from hybrid_attn.model import Execution, abstract_params, losses
from hybrid_attn.model.loss import weighted_sum
from hybrid_attn.parallel.mesh import TOKENS_BT, make_mesh
from hybrid_attn.train import curves, evaluation, loop, step

# Arrays are tiny here: compiling takes longer than running. In one piece, without most optimisations and XLA's fusion emitters,
# it takes three fifths of the time. Programs that tests start inherit all of it: without the emitters but with the
# optimisations, a step can compile for minutes. Later versions of XLA do not know the flag of the emitters.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if jax.__version_info__ < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
gc.set_threshold(200_000, 20, 20)  # tracing makes many objects that live on: to look through them less often saves a tenth
jax.config.update("jax_platforms", os.environ.get("TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)


def optimised(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """A program, compiled with the optimisations of XLA that the tests switch off."""
    fusions = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return lowered.compile(fusions)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def temporary_bytes(lowered: jax.stages.Lowered) -> int:
    """The bytes of temporaries of a program, compiled as `optimised` does."""
    return optimised(lowered).memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def known_peak_and_no_pictures():
    """What this machine's matmuls reach takes a second to measure, of every run, and the pictures of a report one to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", lambda *_: (1e11, "measured"))
        patch.setattr(evaluation.report, "write", lambda folder, runs: (folder / "report.html").write_text(""))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A glob of forty small documents of lines with some order in them."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(10 + i)))
    return str(folder / "*.txt")


def pytest_configure(config: pytest.Config):
    """Compiled programs of the tests, of the processes of pytest-xdist and of programs that tests start share a folder."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}


def pytest_sessionfinish():
    """Looks for garbage once more, and takes the rest out of the search: pytest would look ten times, for some seconds."""
    gc.collect()
    gc.freeze()


def pytest_itemcollected(item: pytest.Item):
    """Marks exhaustive tests as slow too, so that -m 'not slow' leaves them out."""
    if item.get_closest_marker("exhaustive"):
        item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def compile_once():
    """What one test has traced and compiled, another runs: most of the time here would go into making the same step again."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_step", functools.cache(step.make_step))
        patch.setattr(curves, "write", lambda *_: None)  # drawing the loss of a run takes a second
        # Orbax would have each device write a part of every replicated array, and compile a program that cuts it out.
        handler = ocp.type_handlers.get_type_handler(jax.Array)
        patch.setattr(handler, "_min_slice_bytes_for_replica_parallel", 2**20)
        yield


def every(choice: str) -> config.Table:
    """The same choice for a kind of layer of any letter."""
    return config.Table(dict.fromkeys(string.ascii_uppercase, choice))


BLOCKED = Execution(jnp.dtype("float32"), every("none"), every("gather"), False, "blocked", loss_chunk=16, mlp_chunk=7)
REFERENCE = BLOCKED._replace(kernel="reference", mlp_chunk=None)


def tiny(changes=None, **kinds) -> config.Config:
    """A small checked config with an L and a G: tiny({"model.block": "pre"}, G={"temperature.type": "learned"})."""
    c = base.get_config()
    c.model.update(pattern="LG", num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, vocab_size=384)
    for letter, fields in ({"L": {"window": 5, "rope_theta": 100.0}, "G": {}} | kinds).items():
        c.model.kinds[letter] = base.kind()
        c.model.kinds[letter].update_from_flattened_dict(fields)
    c.stages[0].update(steps=5, seq_len=48, batch=8)
    c.update_from_flattened_dict(changes or {})
    return config.build(c)


# For tests of what is around a model: half as much to compile.
ONE_LAYER = {"model.pattern": "L", "model.num_layers": 1, "train.remat": "none"}


def mesh_of(data=1, fsdp=1, context=1, tensor=1, slices=1, expert=1):
    """A mesh over the first devices that it needs."""
    sizes = config.Mesh(slices, data, fsdp, expert, context, tensor)
    return make_mesh(sizes, jax.devices()[: math.prod(dataclasses.astuple(sizes))])


@pytest.fixture
def one_device():
    """A mesh of one device, in force."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        yield mesh


@contextlib.contextmanager
def tool(name: str, **replaced):
    """A new module of the program `name`, with modules in place of some that it imports; its flags end with it."""
    before, root = set(flags.FLAGS), Path(__file__).parents[1]
    folder = next(x for x in (root / "hybrid_attn/commands", root / "tools") if (x / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(f"{name}_tool", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for path, other in {**replaced, spec.name: module}.items():
                patch.setitem(sys.modules, path, other)
            spec.loader.exec_module(module)
            yield module
    finally:
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)


def tensorboard_events(workdir: Path) -> list[event_pb2.Event]:
    """All events, oldest file first; a record is its length in 8 bytes, 4 of checksum, itself, 4 of checksum."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def random_params(model: config.Model, seed: int = 0) -> dict:
    """Parameters away from their initial values, the same on every mesh: no norm's weight is 1 and no sink is 0."""
    rng, mesh = np.random.default_rng(seed), jax.sharding.get_mesh()

    def draw(path, leaf):
        x = 0.2 * rng.normal(size=leaf.shape)
        if path[-1].key in ("weight", "temperature"):
            x = 1 + 2 * x
        return jax.device_put(x.astype(np.float32), NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map_with_path(draw, abstract_params(model))


def layout(row: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of "aaabb.": a letter for each token, another for the next document, "." for padding."""
    positions, segments = np.zeros((2, len(row)), np.int32)
    for t, letter in enumerate(row):
        goes_on = t > 0 and letter == row[t - 1]
        segments[t] = 0 if letter == "." else segments[t - 1] if goes_on else segments[:t].max(initial=0) + 1
        positions[t] = positions[t - 1] + 1 if goes_on and letter != "." else 0
    return positions, segments


def batch_of(*rows: str, seed: int = 0) -> dict:
    """A batch of random tokens with the `layout` of each row; the last token of a document weighs nothing."""
    rng, shape = np.random.default_rng(seed), (len(rows), len(rows[0]))
    positions, segments = (np.stack(x) for x in zip(*map(layout, rows), strict=True))
    follows = np.pad(segments[:, 1:], ((0, 0), (0, 1))) == segments
    return {
        "tokens": rng.integers(0, 384, shape, np.int32),
        "targets": rng.integers(0, 384, shape, np.int32),
        "positions": positions,
        "segments": segments,
        "weights": (follows & (segments > 0)).astype(np.float32),
    }


# Eight rows of one to three documents and as many weighted tokens as 48, 39, …, 3.
BATCH = batch_of(
    *(
        ("a" * first + "b" * 7 + "c" * 48)[: 48 - padding] + "." * padding
        for first, padding in ((48, 0), (17, 7), (3, 20), (30, 0), (11, 1), (25, 13), (41, 0), (9, 44))
    )
)


def everything(pattern: str, window: int) -> config.Model:
    """A small model with parameters of every kind, and heads that eight devices can share."""
    heads = {"model.num_heads": 16, "model.num_kv_heads": 8, "model.head_dim": 4}
    layers = {"model.pattern": pattern, "model.num_layers": max(2, len(pattern))}
    return tiny(
        heads | layers,
        L={"window": window, "rope_theta": 100.0, "temperature.type": "learned", "gate": "head"},
        G={"qk_norm": "rms", "qk_norm_scope": "projection", "sink": True},
    ).model


def mean_loss(nll_BT, lse_BT, weights_BT, z_loss: float):
    """Over the weighted tokens of a batch."""
    return weighted_sum(nll_BT, lse_BT, weights_BT, z_loss) / jnp.maximum(weights_BT.sum(), 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_and_grads(model: config.Model, execution: Execution, params: dict, batch: dict):
    """The loss with a z-loss, and its gradients."""

    def loss(params):
        nll_BT, lse_BT = losses(model, params, batch, execution)
        return mean_loss(nll_BT, lse_BT, batch["weights"], 1e-3)

    return jax.value_and_grad(loss)(params)


def on_mesh(batch: dict) -> dict:
    """The [B, T] arrays of a batch laid out on the mesh in force."""
    sharding = NamedSharding(jax.sharding.get_mesh(), TOKENS_BT)
    return {name: jax.device_put(x, sharding) for name, x in batch.items()}


def assert_close(actual, expected, tolerance: float) -> None:
    """Every leaf equal to within `tolerance` times the largest number in it."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        error = np.max(np.abs(a - b), initial=0.0)
        assert error <= tolerance * np.max(np.abs(b), initial=0.0), f"{jax.tree_util.keystr(path)}: {error}"


def biggest_array(function, *args, inside: str | None = None) -> int:
    """Elements of the biggest array that `function` makes on one device, inside loops and shards too.

    With the name of a primitive, only those in the bodies of its calls.
    """

    def jaxprs(value):
        if isinstance(value, (Jaxpr, ClosedJaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            for x in value:
                yield from jaxprs(x)

    def sizes(jaxpr, counts):
        for equation in jaxpr.eqns:
            if counts:
                yield from (math.prod(x.aval.shape) for x in equation.outvars)
            for inner in jaxprs(tuple(equation.params.values())):
                yield from sizes(inner, counts or equation.primitive.name == inside)

    return max(sizes(jax.make_jaxpr(function)(*args), inside is None))


@pytest.fixture(scope="module")
def evaluate():
    """The program that evaluates checkpoints."""
    with tool("evaluate") as module:
        yield module


def models_config(folder, **changes):
    return tiny({"data.sources": {"text": base.source(paths=(f"{folder}/*.txt",))}} | changes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Workdirs of untrained models, of which one has two checkpoints and trades tokens for heads, and the text of all."""
    folder = tmp_path_factory.mktemp("models")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}.\n" for j in range(20)))
    ulysses = {"train.context": "G=ulysses"}
    for name, seed, steps, changes in (("one", 0, [7], {}), ("two", 1, [7], {}), ("three", 2, [7, 8], ulysses)):
        c = models_config(folder, **changes)
        with jax.set_mesh(mesh_of()):
            checkpoints = checkpoint.Checkpoints(folder / name / "checkpoints", keep=2, every=1)
            state = {"params": random_params(c.model, seed)}
            for step in steps:
                checkpoints.save(step, state, {"stage_steps": [step], "stage": {"tokenizer": "bytes"}}, config.to_dict(c))
            checkpoints.close()
    return folder
