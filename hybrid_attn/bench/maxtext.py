"""The nearest model that MaxText has, its steps and its answers: contenders that run in a Python environment with MaxText.

MaxText chooses a block of layers by name. Its block `olmo3` has the layout of local and global layers that ours has by default.
`DIFFERENT` says what it cannot express. Nothing here imports JAX before a contender is made.
"""

import os
import time

from hybrid_attn.bench import machine
from hybrid_attn.bench.contender import Answer, Ready

PERIOD = 4  # layers: three with a window and a global one
DIFFERENT = (
    "MaxText runs its block `olmo3`, with the same layers, widths, window and tokens. Its global layers rotate queries and "
    "keys too, its attention and feed-forward follow each other with a norm after each, where ours run side by side behind "
    "one norm, and its initial values are its own. Its attention on a CPU, `dot_product`, computes all S x S scores of every "
    "layer."
)


def no_such_model(model) -> str:
    """Why MaxText cannot express the layers of a `Model`, empty if it can."""
    kinds = [model.kinds[letter] for letter in model.layers]
    windows = [kind.window for kind in kinds]
    pattern = [None if i % PERIOD == PERIOD - 1 else windows[0] for i in range(len(windows))]
    dense = all((kind.mixer, kind.mlp.type) == ("attention", "gated") for kind in kinds)
    if windows == pattern and windows[0] and dense and len(windows) % PERIOD == 0:
        return ""
    return f"it has no layout {model.layers} of such layers: three with one window and a global one, dense, repeated"


def too_large(c, limit: int) -> str:
    """Why MaxText cannot compute a sequence of `c` in `limit` bytes, or empty: it holds all scores of a layer in float32."""
    scores = 4 * c.stages[0].batch * c.model.num_heads * c.stages[0].seq_len ** 2
    text = f"the scores of one layer take {scores / machine.GIB:.3g} GiB, and --memory_gib is {limit / machine.GIB:.3g}"
    return text if scores > limit else ""


def arguments(c, directory: str) -> list[str]:
    """The command line of MaxText for the model and the sequence length of a `Config`, without files, logs and caches."""
    model, stage = c.model, c.stages[0]
    local = model.kinds[model.layers[0]]
    sizes = {
        "decoder_block": "olmo3",
        "base_emb_dim": model.d_model,
        "base_mlp_dim": model.d_ff,
        "base_num_query_heads": model.num_heads,
        "base_num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "base_num_decoder_layers": model.num_layers,
        "inhomogeneous_layer_cycle_interval": PERIOD,
        "sliding_window_size": local.window,
        "vocab_size": model.vocab_size,
        "logits_via_embedding": model.tie_embeddings,
        "max_target_length": stage.seq_len,
        "per_device_batch_size": stage.batch,
    }
    run = {"run_name": "bench", "base_output_directory": directory, "dataset_type": "synthetic", "hardware": "cpu"}
    run |= {"attention": "dot_product", "jax_cache_dir": "", "skip_jax_distributed_system": True}
    run |= {"dtype": "float32", "weight_dtype": "float32"}
    run |= {name: False for name in ("scan_layers", "enable_checkpointing", "enable_tensorboard", "log_config", "packing")}
    return [f"{name}={value}" for name, value in (sizes | run).items()]


def of_steps(c, directory: str, recompute: bool) -> list[str]:
    """The command line for the steps of a `Config`."""
    optim = c.optim
    adamw = {"adam_b1": optim.b1, "adam_b2": optim.b2, "adam_eps": optim.eps, "adam_weight_decay": optim.weight_decay}
    more = {"steps": c.total_steps, "learning_rate": optim.lr, "gradient_clipping_threshold": optim.clip_norm}
    more |= {"remat_policy": "full" if recompute else "none"}
    return arguments(c, directory) + [f"{name}={value}" for name, value in (adamw | more).items()]


def of_answers(c, directory: str, prompt: int) -> list[str]:
    """The command line for answers to a prompt of so many tokens."""
    return [*arguments(c, directory), f"max_prefill_predict_length={prompt}", "decode_sampling_strategy=greedy"]


def batch_of(tokens_BT: list[list[int]]) -> dict:
    """MaxText's fields of sequences of one document each; the last token has no target."""
    import numpy as np

    tokens_BT = np.array(tokens_BT, np.int32)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    has_target_BT = np.ones_like(tokens_BT)
    has_target_BT[:, -1] = 0
    inputs = {"inputs": tokens_BT, "inputs_position": positions_BT, "inputs_segmentation": np.ones_like(tokens_BT)}
    targets = {"targets": np.roll(tokens_BT, -1, axis=1), "targets_position": positions_BT}
    return inputs | targets | {"targets_segmentation": has_target_BT}


def make_steps(arguments: list[str], tokens_BT: list[list[int]]) -> Ready:
    """Steps of MaxText's trainer, which are compiled ahead as in its own loop."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # no use of cloud services
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    c, recorder = train.initialize(["train", *arguments])
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(c, recorder)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(state.model, nnx.Param)))
    graph, state = nnx.split(state)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(c, shardings)
    functions = train.train_step, train.eval_step
    step, _ = train_utils.jit_train_and_eval_step(c, graph, mesh, state, shardings, *functions, params_shardings=of_params)
    batch = jax.device_put(batch_of(tokens_BT), sharding.get_input_data_sharding(c, mesh))
    with jax.set_mesh(mesh), logical_axis_rules(c.logical_axis_rules):
        program = step.lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(jax.block_until_ready(metrics)["scalar"]["learning/loss"])

    return Ready(run, None, parameters)


def make_answers(arguments: list[str], prompt: list[int], new: int) -> Ready:
    """Answers of `new` tokens to a prompt by MaxText's engine, compiled in the first call."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import numpy as np
    from maxtext.configs import pyconfig
    from maxtext.inference.maxengine import maxengine

    result_type = maxengine.engine_api.ResultTokens
    if getattr(maxengine.engine_api, "_IS_STUB", False):  # without JetStream, its results come from a class unknown to JAX
        jax.tree_util.register_pytree_node(result_type, lambda x: ([x.data], None), lambda _, data: result_type(data=data[0]))
    engine, rng = maxengine.MaxEngine(pyconfig.initialize(["decode", *arguments])), jax.random.key(0)
    params, tokens = engine.load_params(rng=rng), np.array(prompt, np.int32)

    def run() -> Answer:
        begin = time.perf_counter()
        prefix, result = engine.prefill(params=params, padded_tokens=tokens, true_length=len(prompt), rng=rng, slot=0)
        state, answer = engine.insert(prefix, engine.init_decode_state(rng=rng), slot=0), [int(result.data[0, 0])]
        first = time.perf_counter()
        while len(answer) < new:
            state, result = engine.generate(params, state, rng=rng)
            answer.append(int(result.data[0, 0]))
        return Answer(first - begin, (time.perf_counter() - first) / (new - 1), answer, None)

    return Ready(run, None, sum(x.size for x in jax.tree.leaves(params)))
