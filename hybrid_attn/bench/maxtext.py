"""MaxText's training steps and answers of a model that is exported as Olmo 3, in a Python environment with MaxText.

Nothing here imports JAX before a contender is made, and nothing that MaxText's environment lacks. `arguments` are the command
line of MaxText that hybrid_attn/bench/maxtext_config.py makes of a config.
"""

import os
import time

from hybrid_attn.bench.contender import Answer, Ready

BATCH = {  # MaxText's fields of a batch -> those of our trainer
    "inputs": "tokens", "inputs_position": "positions", "inputs_segmentation": "segments",
    "targets": "targets", "targets_position": "positions", "targets_segmentation": "weights",
}  # fmt: skip
TENSORS = {  # module of a MaxText layer -> module of the export; the path of MaxText's parameter has one name more
    "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj", "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj", "attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj", "mlp/wi_1": "mlp.up_proj", "mlp/wo": "mlp.down_proj",
    "post_self_attention_layer_norm": "post_attention_layernorm", "post_mlp_layer_norm": "post_feedforward_layernorm",
}  # fmt: skip
OUTSIDE = {"token_embedder": "model.embed_tokens", "decoder/decoder_norm": "model.norm", "decoder/logits_dense": "lm_head"}


def tensor_name(path: tuple[str, ...]) -> str:
    """The tensor of the export that is the parameter at a path of MaxText, such as decoder/layers_3/mlp/wo/kernel."""
    module = "/".join(path[:-1])
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    layer, in_layer = path[1].removeprefix("layers_"), "/".join(path[2:-1])
    return f"model.layers.{layer}.{TENSORS[in_layer]}.weight"


def exported_weights(params, directory: str):
    """The `nnx.State` of parameters with the values of an export; KeyError for a parameter that it lacks.

    A matrix [in, out] of MaxText, whose axes may be split into heads, is [out, in] in the export.
    """
    from flax import nnx
    from safetensors.numpy import load_file

    tensors, loaded = load_file(f"{directory}/model.safetensors"), []
    for path, parameter in nnx.to_flat_state(params):
        tensor = tensors[tensor_name(path)]
        value = tensor.T if path[-1] == "kernel" else tensor
        loaded.append((path, parameter.replace(value.reshape(parameter.get_value().shape))))
    return nnx.from_flat_state(loaded)


def number_of(params) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(params))


def make_steps(arguments: list[str], directory: str, batch: dict[str, list]) -> Ready:
    """Steps of MaxText's trainer on one batch, which are compiled ahead as in its own loop."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"  # no use of cloud services
    import jax
    import numpy as np
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    c, recorder = train.initialize(["train", *arguments])
    _, _, shardings, _, mesh, *_, state = train_utils.setup_train_loop(c, recorder)
    params = exported_weights(nnx.state(state.model, nnx.Param), directory)
    nnx.update(state.model, jax.device_put(params))
    graph, state = nnx.split(state)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(c, shardings)
    functions = train.train_step, train.eval_step
    step, _ = train_utils.jit_train_and_eval_step(c, graph, mesh, state, shardings, *functions, params_shardings=of_params)
    batch = {name: np.array(batch[ours], np.int32) for name, ours in BATCH.items()}
    batch = jax.device_put(batch, sharding.get_input_data_sharding(c, mesh))
    with jax.set_mesh(mesh), logical_axis_rules(c.logical_axis_rules):
        program = step.lower(state, batch).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(jax.block_until_ready(metrics)["scalar"]["learning/loss"])

    return Ready(run, None, number_of(params), c.attention)


def make_answers(arguments: list[str], directory: str, prompt: list[int], new: int) -> Ready:
    """Answers of `new` tokens to a prompt by MaxText's engine, compiled in the first call."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import numpy as np
    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.inference.maxengine import maxengine

    result_type = maxengine.engine_api.ResultTokens
    if getattr(maxengine.engine_api, "_IS_STUB", False):  # without JetStream, its results come from a class unknown to JAX
        jax.tree_util.register_pytree_node(result_type, lambda x: ([x.data], None), lambda _, data: result_type(data=data[0]))
    engine, rng = maxengine.MaxEngine(pyconfig.initialize(["decode", *arguments])), jax.random.key(0)
    _, abstract_params, _ = nnx.split(engine.model, nnx.Param, ...)
    params = engine.load_params(params=exported_weights(abstract_params, directory), rng=rng)
    tokens = np.array(prompt, np.int32)

    def run() -> Answer:
        begin = time.perf_counter()
        prefix, result = engine.prefill(params=params, padded_tokens=tokens, true_length=len(prompt), rng=rng, slot=0)
        state, answer = engine.insert(prefix, engine.init_decode_state(rng=rng), slot=0), [int(result.data[0, 0])]
        first = time.perf_counter()
        while len(answer) < new:
            state, result = engine.generate(params, state, rng=rng)
            answer.append(int(result.data[0, 0]))
        return Answer(first - begin, (time.perf_counter() - first) / (new - 1), answer, None)

    return Ready(run, None, number_of(params), engine.config.attention)
