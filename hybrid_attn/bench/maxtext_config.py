"""The command line of MaxText for a `Config`, and the models that it cannot express.

MaxText chooses the layers of a model by name. Its block `olmo3` has three layers with a window and one without in turn, RoPE in
all of them, a norm after the mixer and after the feed-forward, and an RMSNorm over all heads of the queries and of the keys.
"""

from hybrid_attn import config
from hybrid_attn.bench import machine
from hybrid_attn.config import Config, Model
from hybrid_attn.configs import base
from hybrid_attn.convert import families
from hybrid_attn.trees import check

PERIOD = "LLLG"
WINDOW, THETA = 4096, 10_000.0  # of a layer that has none here
MODEL = {  # our field of the model -> MaxText's: what the command line translates
    "vocab_size": "vocab_size",
    "num_layers": "base_num_decoder_layers",
    "d_model": "base_emb_dim",
    "d_ff": "base_mlp_dim",
    "num_heads": "base_num_query_heads",
    "num_kv_heads": "base_num_kv_heads",
    "head_dim": "head_dim",
    "norm_eps": "normalization_layer_epsilon",
    "tie_embeddings": "logits_via_embedding",
}
OPTIM = {"lr": "learning_rate", "b1": "adam_b1", "b2": "adam_b2", "eps": "adam_eps", "weight_decay": "adam_weight_decay"}
OPTIM |= {"clip_norm": "gradient_clipping_threshold"}
BLOCK = {  # the values that MaxText's block has for other fields than those
    "block": "post", "norm": "rms", "rope_layout": "half", "prefix": "", "pattern": PERIOD,
}  # fmt: skip
OLMO3 = {  # the same in MaxText; its model name makes one norm of all heads
    "model_name": "olmo3-7b",
    "override_model_config": True,
    "decoder_block": "olmo3",
    "inhomogeneous_layer_cycle_interval": len(PERIOD),
    "use_qk_norm": True,
    "rope_type": "default",
    "normalize_embedding_logits": False,
}
RUN = {
    "run_name": "bench",
    "dataset_type": "synthetic",
    "hardware": "cpu",
    "attention": "dot_product",
    "jax_cache_dir": "",
    "skip_jax_distributed_system": True,
    "dtype": "float32",
    "weight_dtype": "float32",
} | dict.fromkeys(("scan_layers", "enable_checkpointing", "enable_tensorboard", "log_config", "packing"), False)


def rope_and_window(model: Model) -> dict:
    """MaxText's fields of the first layer, which has a window and RoPE, and of the last one of its period, which has RoPE."""
    local, full = (model.kinds[model.layers[min(i, model.num_layers - 1)]] for i in (0, len(PERIOD) - 1))
    thetas = {"local_rope_max_timescale": local.rope_theta or THETA, "rope_max_timescale": full.rope_theta or THETA}
    return {"sliding_window_size": local.window or WINDOW} | thetas


def expressed(model: Model) -> Model:
    """The model that MaxText computes with the command line for `model`."""
    translated = {name: getattr(model, name) for name in (*MODEL, "init_std")}  # initial values are loaded
    of_layers = rope_and_window(model)
    kinds = {
        letter: base.kind(
            window=of_layers["sliding_window_size"] if letter == "L" else None,
            rope_theta=of_layers["local_rope_max_timescale" if letter == "L" else "rope_max_timescale"],
            qk_norm="rms",
            qk_norm_scope="projection",
        ).to_dict()
        for letter in set(PERIOD)
    }
    return config.build_model(base.get_config().model.to_dict() | BLOCK | translated | {"kinds": kinds})


def check_model(model: Model) -> None:
    """ValueError where MaxText would compute another model: in one line, the fields that differ and the value it has."""
    lines = families.differences(families.trained(model), expressed(model))
    lines += [f"model.adapter.type: {model.adapter.type!r} -> None"] if model.adapter.type else []

    differences = "; ".join(line.strip() for line in lines)
    cure = "compare the layout of Olmo 3, --config=configs/bench.py:olmo3, or leave MaxText out of --options=contenders"
    check(not lines, f"MaxText's block olmo3 cannot express this model ({differences}); {cure}")


def too_large(c: Config, limit: int) -> str:
    """Why MaxText cannot compute a sequence of `c` in `limit` bytes, or empty: it holds all scores of a layer in float32."""
    scores = 4 * c.stages[0].batch * c.model.num_heads * c.stages[0].seq_len ** 2
    text = f"the scores of one layer take {scores / machine.GIB:.3g} GiB, and --memory_gib is {limit / machine.GIB:.3g}"
    return text if scores > limit else ""


def arguments(c: Config, directory: str) -> list[str]:
    """The command line for the model and the sequence length of a config; MaxText writes its files into `directory`."""
    stage = c.stages[0]
    model = {theirs: getattr(c.model, ours) for ours, theirs in MODEL.items()} | rope_and_window(c.model)
    sizes = {"max_target_length": stage.seq_len, "per_device_batch_size": stage.batch, "base_output_directory": directory}
    return [f"{name}={value}" for name, value in (OLMO3 | RUN | model | sizes).items()]


def of_steps(c: Config, directory: str) -> list[str]:
    """The command line for the steps of a config; `train.remat` is none or layer. Its learning rate has MaxText's schedule."""
    optim = {theirs: getattr(c.optim, ours) for ours, theirs in OPTIM.items()}
    remat = {"none": "none", "layer": "full"}[c.train.remat]
    of_run = optim | {"steps": c.total_steps, "remat_policy": remat}
    return arguments(c, directory) + [f"{name}={value}" for name, value in of_run.items()]


def of_answers(c: Config, directory: str, prompt: int) -> list[str]:
    """The command line for answers to a prompt of so many tokens."""
    return [*arguments(c, directory), f"max_prefill_predict_length={prompt}", "decode_sampling_strategy=greedy"]
