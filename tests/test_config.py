"""A config says what does not fit, by its key, with the numbers and a cure."""

import copy
import math
import re

import pytest
from conftest import tiny

from configs import base
from hybrid_attn import config

DEFAULTS = config.to_dict(config.build(base.get_config()))


def error_of(change):
    """What `build` says to the defaults after `change`."""
    values = copy.deepcopy(DEFAULTS)
    change(values)
    with pytest.raises(ValueError) as caught:
        config.build(values)
    return str(caught.value)


def put(path, value):
    """A change that puts `value` at a dotted path."""

    def change(values):
        *groups, last = path.split(".")
        for group in groups:
            values = values[int(group) if group.isdigit() else group]
        values[last] = value

    return change


SUGGESTED = {
    "optim.warmup_step": "optim.warmup_steps",
    "optim.learning_rate": "optim.lr",
    "optim.beta2": "optim.b2",
    "optim.epsilon": "optim.eps",
    "optim.max_grad_norm": "optim.clip_norm",
    "model.hidden_size": "model.d_model",
    "model.kinds.L.sliding_window": "model.kinds.L.window",
    "model.n_head": "model.num_heads",
    "model.vocab": "model.vocab_size",
    "model.window": "model.kinds.G.window",
    "stages.0.batch_size": "stages[0].batch",
    "stages.0.gradient_accumulation_steps": "stages[0].microbatches",
    "train.save_every": "train.checkpoint_every",
    "steps": "stages[0].steps",
    "lr": "optim.lr",
}


@pytest.mark.parametrize("path, near", [("optim.gamma", None), *SUGGESTED.items()])
def test_an_unknown_key_is_named_with_the_one_that_is_meant_by_its_spelling_its_usual_name_or_its_abbreviation(path, near):
    message = error_of(put(path, 1))
    assert message.startswith(f"unknown key config.{path.replace('.0', '[0]')}; ")
    assert message.endswith(f"; did you mean config.{near}?" if near else "rollback_steps") and (
        "known keys: optimiser, lr, b1, b2" in message
    ) != bool(near)


def test_an_unknown_key_inside_a_kind_and_inside_a_stage_is_named_by_its_path():
    assert "unknown key config.model.kinds.L.windw; did you mean config.model.kinds.L.window?" in error_of(
        put("model.kinds.L.windw", 3)
    )
    assert "unknown key config.stages[0].step; did you mean config.stages[0].steps?" in error_of(put("stages.0.step", 3))


def test_a_missing_key_is_named():
    message = error_of(lambda values: values["train"].pop("remat"))
    assert "config.train lacks remat" in message and "configs/base.py" in message


@pytest.mark.parametrize(
    "path, value, kind",
    [
        ("model.num_layers", "four", "int"),
        ("model.num_layers", 4.0, "int"),
        ("model.num_layers", True, "int"),
        ("optim.lr", "3e-3", "float"),
        ("model.tie_embeddings", 1, "bool"),
        ("model.kinds.L.window", "512", "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_the_type_it_should_have(path, value, kind):
    assert f"config.{path}={value!r} must be of type {kind}" in error_of(put(path, value))


def leaves(values, path=""):
    """The dotted path and the value of every key of a config that is no group of keys."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        groups = value if isinstance(value, dict) else isinstance(value, list) and value and isinstance(value[0], dict)
        if groups:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


KEYS = dict(leaves(DEFAULTS))
OPTIONAL = {"window", "chunk", "rope_theta", "attention_factor", "scale", "softcap", "logit_softcap", "store", "label", "task"}
OPTIONAL |= {"mlp_chunk", "every", "path", "step", "ema_half_life", "spike_factor", "rollback_steps", "lr_schedule", "name"}
OPTIONAL |= {"tokens", "batch_ramp_tokens", "warmup_tokens", "statistics_every", "mup_base_width", "mup_base_depth"}
OPTIONAL |= {"preference", "unembed_init_std", "bias_rate", "shared_d_ff", "share_kv", "domain_dim", "swiglu_limit"}
OPTIONAL |= {"rank_fraction", "turn_patience", "turn_indicator", "short_conv"}


def is_optional(path):
    name, exceptions = path.rpartition(".")[2], ("temperature.scale", "evals.tokens")
    return path.endswith(("mlp.d_ff", "adapter.type")) or (name in OPTIONAL and not path.endswith(exceptions))


@pytest.mark.parametrize("path", KEYS)
def test_no_key_takes_a_value_that_is_not_finite_is_far_too_large_or_of_another_type(path):
    name, accepted = path.rpartition(".")[2], []
    values = [
        math.nan,
        math.inf,
        -math.inf,
        -(10**30),
        10**30,
        10.0**300,
        10**400,
        -1e-9,
        "x",
        "",
        object(),
        [],
        {},
        {1: 2},
        [[]],
        None,
    ]
    for wrong in values:
        changed = copy.deepcopy(DEFAULTS)
        put(path, wrong)(changed)
        try:
            config.build(changed)
            accepted.append(wrong)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error), error
    allowed = [None] * is_optional(path)
    # Names in tables are checked elsewhere.
    in_tables = name in ("mixer", "objective", "optimiser") or path.endswith(("mlp.type", "adapter.type"))
    allowed += ["", "x"] * in_tables
    allowed += [""] * (name in ("label", "tokenizer", "prefix")) + ["x"] * (name in ("store", "label", "tokenizer"))
    allowed += ["x"] * (path in ("init_from.path", "stages.0.name"))
    lists = ("paths", "names", "lengths", "new", "ignore", "rename", "model_changes", "batch_ramp", "trainable", "sinks")
    allowed += [[]] * (name in lists) + [{}] * (name in ("mixture", "override"))
    assert all(any(x is y or x == y for y in allowed) for x in accepted), accepted
    assert (None in accepted) == (None in allowed)


def test_groups_and_lists_are_not_taken_for_values():
    assert "config.mesh=4 must be a group of keys" in error_of(put("mesh", 4))
    for group in ("model", "optim", "train", "init_from"):
        assert f"config.{group}=5 must be a group of keys" in error_of(put(group, 5))
    assert config.upgraded({"train": 4})["train"] == 4  # `build` then says what is wrong
    assert "config.stages=4 must be a list" in error_of(put("stages", 4))


def test_whole_numbers_pass_for_floats_and_none_for_what_may_be_none():
    values = config.to_dict(config.build(base.get_config()))
    values["optim"]["lr"], values["model"]["kinds"]["L"]["window"] = 1, None
    c = config.build(values)
    assert isinstance(c.optim.lr, float) and c.model.kinds["L"].window is None


def test_query_heads_that_the_key_heads_do_not_divide_are_refused_with_a_number_that_fits():
    for heads, kv, cure in ((10, 4, 8), (3, 4, 4)):
        with pytest.raises(ValueError, match=f"num_heads={heads} is not a multiple .*num_kv_heads={kv}; use {cure} heads"):
            tiny({"model.num_heads": heads, "model.num_kv_heads": kv})


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("model.kinds.L.window", 0, "window=0 must be at least 1"),
        ("model.kinds.L.chunk", 8, "window or a chunk, not both"),
        ("model.kinds.L.rope_fraction", 0.0, r"kinds.L.rope_fraction=0.0 must be positive and at most 1"),
        ("model.kinds.L.rope_fraction", 0.1, "kinds.L: rope_fraction=0.1 of head_dim=32 rotates 3 dimensions"),
        ("model.kinds.L.rope_scaling.factor", 0.5, "factor=0.5 must be at least 1"),
        ("model.kinds.G.temperature.length", 1, "length=1 must be at least 2"),
        ("model.kinds.G.softcap", -1.0, "softcap=-1.0 must be positive"),
        ("model.kinds.G.scale", math.nan, "kinds.G.scale=nan must be a finite number"),
        ("model.kinds.L.window", 2**31, "kinds.L.window=2147483648 must be at least 1 and at most 2,147,483,647, or None"),
        ("model.kinds.L.rope_theta", math.inf, "rope_theta=inf must be a finite number"),
        ("model.kinds.L.rope_scaling.attention_factor", 0.0, "attention_factor=0.0 must be positive"),
        ("model.kinds.G.rope_scaling.type", "linear", "'linear' scales nothing without a rope_theta"),
        ("model.kinds.G.qk_norm_after_rope", True, "needs a qk_norm and a rope_theta"),
        ("model.logit_softcap", 0.0, "model.logit_softcap=0.0 must be positive"),
        ("model.norm_eps", -1.0, "model.norm_eps=-1.0 must be positive"),
        ("train.mlp_chunk", 0, "mlp_chunk=0 must be at least 1 and at most 2,147,483,647, or None"),
        ("model.pattern", "LLX", "pattern='LLX' uses 'X'.* G, L$"),
        ("model.pattern", "", "pattern is empty"),
        ("model.prefix", "GX", "prefix='GX' uses 'X'.* G, L$"),
        ("model.prefix", "LLLLL", "prefix='LLLLL' has more layers than model.num_layers=4"),
        ("model.num_layers", 0, "num_layers=0 must be at least 1"),
        ("stages", [], "stages is empty"),
        ("stages.0.batch", 0, r"stages\[0\].batch=0 must be at least 1"),
        ("stages.0.microbatches", 0, r"stages\[0\].microbatches=0 must be at least 1"),
        ("data.holdout", 1.0, "holdout=1.0 must be positive and below 1"),
        ("data.sources", {}, "data.sources is empty"),
        ("data.sources.text.min_length", -1, "min_length=-1 must be at least 0"),
        (
            "data.sources.text",
            base.source(task="recall", pairs=17),
            "pairs=17 must lie between 1 and 8 for task='recall'",
        ),
        ("data.sources.text", base.source(task="mqar", pairs=0), "pairs=0 must lie between 1 and 127"),
        ("data.sources.text", base.source(task="tracking", pairs=5), "pairs=5 must lie between 1 and 4 for task='tracking'"),
        ("data.sources.text", base.source(task="copy", label="x"), "task='copy' or documents, and label='x' is of documents"),
        ("stages.0.mixture", {"text": 0.0}, "sum to zero"),
        ("stages.0.mixture", {"text": -1.0}, r"stages\[0\].mixture.text=-1.0 must be at least 0"),
        ("stages.0.mixture", {"tex": 1.0}, r"stages\[0\].mixture names 'tex', .*; did you mean 'text'\?"),
        ("stages.0.mixture", {"web": 1.0}, r"stages\[0\].mixture names 'web', .*; there are text"),
        ("optim.decay_fraction", 1.5, "decay_fraction=1.5 must be positive and at most 1"),
        ("optim.clip_norm", 0.0, "clip_norm=0.0 must be positive"),
        ("train.keep", 0, "train.keep=0 must be at least 1"),
        ("evals.every", 0, "evals.every=0 must be at least 1 .*, or None"),
        ("evals.lengths", [1.0, 0.0], "must be positive"),
        ("evals.names", ["position", "position"], "names 'position' twice"),
        ("evals.samples", 0, "evals.samples=0 must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_reason(path, value, words):
    assert re.search(words, error_of(put(path, value)))


@pytest.mark.parametrize(
    "path, value, near",
    [
        ("model.block", "paralel", "parallel"),
        ("model.norm", "layer_norm", "layernorm"),
        ("model.activation", "gelu_tan", "gelu_tanh"),
        ("model.rope_layout", "halff", "half"),
        ("model.kinds.G.qk_norm", "rmss", "rms"),
        ("model.kinds.G.qk_norm_scope", "heads", "head"),
        ("model.kinds.G.gate", "project", "projection"),
        ("model.kinds.G.temperature.type", "learnt", "learned"),
        ("model.kinds.L.rope_scaling.type", "yarm", "yarn"),
        ("optim.schedule", "cosin", "cosine"),
        ("train.kernel", "block", "blocked"),
        ("train.moe_kernel", "tokamac", "tokamax"),
        ("train.remat", "layers", "layer"),
        ("train.context", "gathered", "gather"),
        ("data.packing", "bestfit", "best_fit"),
        ("data.sources.text.task", "recal", "recall"),
        ("train.dtype", "bfloat", "bfloat16"),
    ],
)
def test_a_choice_that_does_not_exist_is_answered_with_the_choices_and_the_nearest(path, value, near):
    message = error_of(put(path, value))
    assert f"={value!r} is not one of" in message and f"did you mean {near!r}?" in message


def test_a_task_is_refused_with_a_tokenizer_that_has_other_ids():
    with pytest.raises(
        ValueError, match="data.sources.x: task='mqar' is written in bytes; use data.tokenizer='bytes', not 'a.json'"
    ):
        tiny({"data.sources": {"x": base.source(task="mqar")}, "data.tokenizer": "a.json"})


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("layer", {"G": "layer", "L": "layer"}),
        ("offload", {"G": "offload", "L": "offload"}),
        ("L=none", {"G": "layer", "L": "none"}),
        ("G=offload, L=attention", {"G": "offload", "L": "attention"}),
    ],
)
def test_a_choice_for_each_kind_is_one_for_all_or_by_letter(value, wanted):
    c = tiny({"train.remat": value})
    assert config.remat(c.model, c.train) == wanted


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("auto", {"C": "halo", "G": "gather", "L": "halo"}),
        ("G=ring", {"C": "halo", "G": "ring", "L": "halo"}),
        ("ulysses", {"C": "ulysses", "G": "ulysses", "L": "ulysses"}),
        ("L=gather,C=halo", {"C": "halo", "G": "gather", "L": "gather"}),
    ],
)
def test_auto_is_a_halo_where_the_mask_is_bounded_and_a_gather_elsewhere(value, wanted):
    c = tiny({"model.pattern": "LCG", "model.num_layers": 3, "train.context": value}, C={"chunk": 8})
    assert config.context(c.model, c.train) == wanted


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("train.remat", "L=layers", "train.remat: L='layers' is not one of .*; did you mean 'layer'"),
        ("train.remat", "X=none", "train.remat='X=none' names 'X', and the layers of the model are G, L"),
        ("train.remat", "L=none,L=layer", "names 'L' twice"),
        ("train.remat", "none,G=layer", "names 'none'"),
        ("train.context", "G=rings", "train.context: G='rings' is not one of .*; did you mean 'ring'"),
        ("train.context", "G=halo", "train.context: G=halo needs a window or a chunk, and model.kinds.G has none"),
        ("train.context", "halo", "G=halo needs a window or a chunk"),
    ],
)
def test_a_choice_by_letter_that_cannot_be_is_refused_with_its_reason(path, value, words):
    assert re.search(words, error_of(put(path, value)))


def test_a_choice_like_no_other_is_answered_with_the_choices_alone():
    message = error_of(put("model.block", "xyz"))
    assert message == "config.model.block='xyz' is not one of 'parallel', 'pre', 'post', 'sandwich'"
