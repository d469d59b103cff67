"""Attention on a CPU in C++, in float32: custom calls of XLA, which `build` compiles once for this machine.

Each thread computes blocks of queries whose scores never leave its cache (`native.cc`), or reads a part of the cache of a
decoded token (`native_decode.cc`). Scores with a soft cap are left to `blocked` and `decoding`.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size; P panels of C keys.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_attn.kernels import blocked, decoding
from hybrid_attn.kernels.interface import AttentionOptions, Keys, Pair, Queries, intervals, padded
from hybrid_attn.kernels.softmax import gradient_shift

SOURCES = [Path(__file__).with_name(name) for name in ("native.cc", "native_decode.cc")]
LIBRARY = Path(__file__).with_name("native_library.so")
MODULE = "hybrid_attn.kernels.native_library"  # the library, for `importlib`
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-w")
PANEL = 64  # keys, as in `native.cc`
LANES = 16  # the head size is padded to a multiple


def build(library: Path = LIBRARY) -> None:
    """Compiles the sources; ValueError, in one line, where that fails."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *map(str, SOURCES), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"there is no compiler {compiler}: {error.strerror}; install g++ or set CXX") from error
        if done.returncode:
            raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {' '.join(done.stderr.split())[:500]}")
        made.replace(library)


@functools.cache
def _targets(library: Path) -> tuple[str, ...]:
    """The names of the three custom calls of a library; NotImplementedError if it was built for another processor."""
    loaded = ctypes.CDLL(str(library))
    loaded.attention_runs_here.restype = ctypes.c_bool
    if not loaded.attention_runs_here():
        raise NotImplementedError(f'{library} is for another processor; build it again here, or use train.kernel="blocked"')
    names = tuple(f"{library}:{name}" for name in ("attention_forward", "attention_backward", "attention_decode"))
    for name in names:
        handler = jax.ffi.pycapsule(getattr(loaded, name.rpartition(":")[2]))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return names


def forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32)."""
    if options.softcap is not None:
        return blocked.forward(options, queries, keys)
    H = queries.q_BTNH.shape[3]
    q_BNTH, k_BKSH, v_BKSH = (_heads_first(x) for x in (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH))
    results = jax.ShapeDtypeStruct(q_BNTH.shape, jnp.float32), jax.ShapeDtypeStruct(q_BNTH.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call(_targets(LIBRARY)[0], results)
    bounds_BT = intervals(options.window, queries, keys)
    o_BNTH, lse_BNT = call(q_BNTH, _panels(k_BKSH), v_BKSH, *bounds_BT, scale=np.float32(options.scale))
    return o_BNTH.swapaxes(1, 2)[..., :H].astype(queries.q_BTNH.dtype), lse_BNT.swapaxes(1, 2)


def backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH), with probabilities computed again from the log-sum-exp."""
    if options.softcap is not None:
        return blocked.backward(options, queries, keys, outputs, grads)
    H, shift_BTN = queries.q_BTNH.shape[3], gradient_shift(grads[0], outputs[0], grads[1])
    q_BNTH, k_BKSH, v_BKSH, do_BNTH = (_heads_first(x) for x in (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, grads[0]))
    lse_BNT, shift_BNT = (x_BTN.swapaxes(1, 2) for x_BTN in (outputs[1], shift_BTN))
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q_BNTH, k_BKSH, v_BKSH)]
    call = jax.ffi.ffi_call(_targets(LIBRARY)[1], results)
    bounds_BT = intervals(options.window, queries, keys)
    arrays = q_BNTH, k_BKSH, _panels(k_BKSH), _panels(v_BKSH), do_BNTH, lse_BNT, shift_BNT, *bounds_BT
    made = call(*arrays, scale=np.float32(options.scale))
    like = queries.q_BTNH, keys.k_BSKH, keys.v_BSKH
    return tuple(dx.swapaxes(1, 2)[..., :H].astype(x.dtype) for dx, x in zip(made, like, strict=True))


def decode(options: AttentionOptions, vector_products: bool, q_BKGH: jax.Array, kv_BKSH: Pair, visible_BKS: jax.Array) -> Pair:
    """(o_BKGH, lse_BKG) in float32; by `decoding` where heads are no whole vectors, or not in float32."""
    is_float32 = q_BKGH.dtype == kv_BKSH[0].dtype == jnp.float32
    if options.softcap is not None or q_BKGH.shape[3] % LANES or not is_float32:
        return decoding.decode(options, vector_products, q_BKGH, kv_BKSH, visible_BKS)
    results = jax.ShapeDtypeStruct(q_BKGH.shape, jnp.float32), jax.ShapeDtypeStruct(q_BKGH.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call(_targets(LIBRARY)[2], results)
    return tuple(call(q_BKGH, *kv_BKSH, visible_BKS, scale=np.float32(options.scale)))


def _heads_first(x_BTNH: jax.Array) -> jax.Array:
    """[B, N, T, H] in float32, with H padded with zeros to whole vectors."""
    x_BTNH = jnp.pad(x_BTNH.astype(jnp.float32), [(0, 0)] * 3 + [(0, -x_BTNH.shape[3] % LANES)])
    return x_BTNH.swapaxes(1, 2)


def _panels(x_BKSH: jax.Array) -> jax.Array:
    """[B, K, P, H, C]: panels of keys, each transposed, the last padded with zeros."""
    B, K, S, H = x_BKSH.shape
    padded_FSH = padded(x_BKSH.reshape(B * K, S, H), PANEL)
    return padded_FSH.reshape(B, K, -1, PANEL, H).swapaxes(3, 4)
