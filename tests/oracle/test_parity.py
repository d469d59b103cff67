"""Against the library that defines the families, on random models: `make test-oracle`, which installs it."""

import functools
import json

import jax
import numpy as np
import pytest
from conftest import BLOCKED, on_mesh, random_params, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hybrid_attn import config  # noqa: E402
from hybrid_attn.convert import families, hf  # noqa: E402
from hybrid_attn.infer.engine import Engine, EngineOptions  # noqa: E402
from hybrid_attn.model import abstract_params, apply, logits  # noqa: E402
from hybrid_attn.train.optim import optimiser  # noqa: E402
from hybrid_attn.train.step import TrainState, make_step  # noqa: E402

WINDOW = 6
LONGEST = 10 * WINDOW + 1
LOCAL, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MULTIPLIERS = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125}
STEPS = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.4, "original_max_position_embeddings": 7}
MOE = {"num_experts": 7, "num_local_experts": 7, "sliding_window": WINDOW, "head_dim": 8}
DENSE_FIRST = {"first_k_dense_replace": 2, "prefix_dense_intermediate_size": 24}
SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 88, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
TRAINED = "cohere2", "gpt_oss", "granite_swa"
CASES = {
    "cohere2": {"sliding_window": WINDOW, "rope_theta": 50_000.0, "logit_scale": 0.25},
    "cohere": {"rope_theta": 10_000.0},
    "cohere qk_norm": {"rope_theta": 75_000_000.0, "use_qk_norm": True, "logit_scale": 0.8333},
    "llama": {"rope_theta": 10_000.0, "num_key_value_heads": 4},
    "llama llama3": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "head_dim": 24},
    "llama yarn": {"rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}, "rope_theta": 10_000.0},
    "llama yarn whose ends cross": {"rope_scaling": YARN | {"original_max_position_embeddings": 2}, "head_dim": 32},
    "llama one pair": {"head_dim": 2, "num_key_value_heads": 1},
    "smollm3": {"rope_theta": 2_000_000.0},
    "smollm3 null": {"num_key_value_heads": None},
    "exaone4": {"rope_theta": 1_000_000.0, "rope_scaling": LLAMA3, "sliding_window": WINDOW, "head_dim": 8},
    "exaone4 full": {"rope_theta": 1_000_000.0, "sliding_window": None, "layer_types": [FULL] * 6},
    "olmo3": {"sliding_window": WINDOW, "rope_theta": 500_000.0, "rope_scaling": YARN},
    "olmo3 older theta": {"sliding_window": WINDOW, "rope_theta": 1000.0},
    "olmo3 with a pattern": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window": WINDOW, "head_dim": 24, "query_pre_attn_scalar": 20},
    "afmoe": {"sliding_window": WINDOW, "head_dim": 8, "num_dense_layers": 6, "mup_enabled": True},
    "granite_swa": {"sliding_window": WINDOW, "layer_rope_theta": [0, 1e4, 1e5, 1e4, 0, 1e4], **MULTIPLIERS},
    "granite_swa llama3": {"sliding_window": WINDOW, "rope_parameters": LLAMA3 | {"rope_theta": 1e4}, "head_dim": 8},
    "cohere2_moe": MOE | DENSE_FIRST | {"num_shared_experts": 2, "num_experts_per_tok": 3},
    "cohere2_moe sum": MOE
    | DENSE_FIRST
    | {
        "num_shared_experts": 1,
        "shared_expert_combination_strategy": "sum",
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "prefix_dense_sliding_window_pattern": 2,
    },
    "granitemoe_swa": MOE | MULTIPLIERS | {"shared_intermediate_size": 56, "layer_rope_theta": [0, 1e4, 1e5, 1e4, 0, 1e4]},
    "afmoe experts": MOE | {"mup_enabled": True, "moe_intermediate_size": 24, "num_experts_per_tok": 3, "route_scale": 2.5},
    "exaone_moe": MOE | {"moe_intermediate_size": 24, "sliding_window_pattern": 3, "num_experts_per_tok": 3},
    "kolibri1": MOE | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 17, "num_experts_per_tok": 3},
    "kolibri1 normed": MOE | {"moe_intermediate_size": 24, "norm_topk_prob": True},
    "gpt_oss": MOE
    | {"swiglu_limit": 0.7, "num_experts_per_tok": 3, "rope_parameters": YARN | {"rope_theta": 1e4, "truncate": False}},
    "ministral3": {"rope_parameters": YARN | {"rope_theta": 1e4, "llama_4_scaling_beta": 0.4}, "head_dim": 24},
    "ministral3 window": {"rope_parameters": STEPS, "sliding_window": WINDOW, "tie_word_embeddings": True},
}


@pytest.fixture(params=CASES)
def theirs(request, tmp_path):
    """A random model of the library, saved with its own spelling of config.json."""
    values = {"model_type": request.param.split()[0]} | SIZES | CASES[request.param]
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text(json.dumps(values))
    torch.manual_seed(len(request.param))
    described = transformers.AutoConfig.from_pretrained(tmp_path / "given")
    model = transformers.AutoModelForCausalLM.from_config(described).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[-1] == 64 // 4:  # norms
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs", values


def ours_of(directory):
    described = hf.read_config(directory)
    model = families.model_of(described)
    return model, hf.read_params(directory, model, described["model_type"], abstract_params(model))


def batch_of(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a whole row, one padded on the left and one padded on the right."""
    tokens = np.random.default_rng(length).integers(0, SIZES["vocab_size"], (3, length), np.int32)
    mask = np.ones_like(tokens)
    mask[1, : length // 3], mask[2, length - length // 4 :] = 0, 0
    return tokens, mask


@functools.partial(jax.jit, static_argnums=0)
def logits_of_batch(model, params, batch):
    return logits(model, params, apply(model, params, batch["tokens"], batch["positions"], batch["segments"], BLOCKED))


def our_logits(model, params, tokens, mask):
    """Of rows with padding up to `LONGEST`, so that each model is compiled once."""
    length = mask.shape[1]
    padded = {"tokens": tokens, "positions": np.tile(np.arange(length, dtype=np.int32), (len(mask), 1)), "segments": mask}
    batch = on_mesh({name: np.pad(x, ((0, 0), (0, LONGEST - length))) for name, x in padded.items()})
    return np.asarray(logits_of_batch(model, params, batch))[:, :length] * mask[..., None]


def their_logits(model, tokens, mask):
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    return out.logits.numpy() * mask[..., None]


def assert_decoding_gives_their_probabilities(ours, params, theirs):
    """Two prompts of unequal lengths, prefilled in chunks and decoded beyond the window."""
    c = config.build({**config.to_dict(tiny()), "model": config.to_dict(ours)})
    prompts = [[5, 6, 7], list(range(20, 40))]
    engine = Engine(params, c, EngineOptions(chunk=8), execution=BLOCKED)
    for prompt, answer in zip(prompts, engine.generate(prompts, 9), strict=True):
        tokens = np.asarray([[*prompt, *answer.tokens]])
        logits = torch.from_numpy(their_logits(theirs, tokens, np.ones_like(tokens)))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer.tokens)), answer.tokens]
        np.testing.assert_allclose(answer.logprobs, expected, atol=2e-4)


def assert_same_logits(ours, theirs, label):
    difference = np.abs(ours - theirs).max()
    print(f"{label}: {difference:.2e} of {np.abs(theirs).max():.2f}")
    assert np.abs(theirs).max() > 0.1 and difference <= 1e-4


def opened(directory):
    """The exported model as the library opens it; no tensor may be missing, unexpected or of another shape."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    return model.eval()


def export(directory, model, params, model_type):
    directory.mkdir()
    shapes = {path: x.shape for path, x in hf.flat(abstract_params(model)).items()}
    described = hf.describe(model, directory, 256, model_type)
    hf.write(directory, model, described, shapes, hf.by_period(params), "float32", 50_000)
    return directory


def one_training_step(model, params):
    """Parameters after a step of the trainer on a random batch."""
    c = config.build({**config.to_dict(tiny({"optim.lr": 1e-2, "optim.warmup_steps": 0})), "model": config.to_dict(model)})
    rng, shape = np.random.default_rng(0), (2, 16)
    batch = {key: rng.integers(0, model.vocab_size, shape, np.int32) for key in ("tokens", "targets")}
    batch |= {"positions": np.tile(np.arange(16, dtype=np.int32), (2, 1)), "segments": np.ones(shape, np.int32)}
    batch |= {"weights": np.ones(shape, np.float32), "bytes": np.ones(shape, np.float32)}
    state = TrainState(jax.numpy.int32(0), params, optimiser(c).init(params))
    return make_step(c.at(0), BLOCKED)(state, on_mesh(batch))[0].params


def with_other_numbers(model_type, model, params):
    """Parameters after a step of the trainer for the types of `TRAINED`, and else by some random change."""
    if model_type in TRAINED:
        return one_training_step(model, params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x * jax.numpy.asarray(1 + 0.1 * rng.normal(size=x.shape), x.dtype), params)


def test_logits_agree_at_every_length_and_with_other_numbers_in_both_directions(theirs, tmp_path, one_device):
    model, directory, given = theirs
    ours, params = ours_of(directory)
    assert families.differences(families.model_of(given), ours) == []  # the spelling that was given, and the library's own
    for length in (WINDOW - 2, WINDOW, LONGEST):
        tokens, mask = batch_of(length)
        assert_same_logits(our_logits(ours, params, tokens, mask), their_logits(model, tokens, mask), length)

    assert_decoding_gives_their_probabilities(ours, params, model)
    others = with_other_numbers(given["model_type"], ours, params)
    again = opened(export(tmp_path / "others", ours, others, given["model_type"]))
    ours_after = our_logits(ours, others, tokens, mask)
    assert_same_logits(ours_after, their_logits(again, tokens, mask), "other numbers")
    assert np.abs(ours_after - their_logits(model, tokens, mask)).max() > 0.01


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text"])
def test_the_library_does_not_apply_an_older_rope_scaling_that_is_refused_here(model_type, tmp_path):
    values = {"model_type": model_type} | SIZES | {"sliding_window": WINDOW, "rope_scaling": {"type": "linear", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    described = transformers.AutoConfig.from_pretrained(tmp_path)
    assert described.rope_parameters[FULL]["rope_type"] == "default"
    with pytest.raises(ValueError, match="which the library of .* ignores"):
        families.model_of(values)


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_what_is_refused_for_its_heads_is_what_the_library_does_not_open(model_type, tmp_path):
    """A width that is no multiple of the heads."""
    values = {"model_type": model_type} | SIZES | {"hidden_size": 66, "head_dim": 16, "query_pre_attn_scalar": 16}
    values |= {"num_dense_layers": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 2} | MOE | {"head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = families.model_of(values)
    try:
        transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    except Exception as cause:  # the library's own class of errors
        assert "multiple of" in str(cause)
        with pytest.raises(ValueError, match="a multiple of model.num_heads=4"):
            families.config_json(model, model_type, 64)
    else:
        families.config_json(model, model_type, 64)


@pytest.mark.parametrize(("pattern", "head_dim"), [("LLLG", 8), ("G", 8), ("GL", 12), ("LLGLLLG", 6)])
def test_a_model_made_here_opens_as_cohere2(pattern, head_dim, tmp_path, one_device):
    changes = {"pattern": pattern, "num_layers": 5, "vocab_size": 61, "head_dim": head_dim}
    model = tiny({f"model.{key}": value for key, value in changes.items()}).model
    params = random_params(model)
    again = opened(export(tmp_path / "out", model, params, None))
    assert again.config.model_type == "cohere2"
    tokens, mask = batch_of(31)
    assert_same_logits(our_logits(model, params, tokens, mask), their_logits(again, tokens, mask), pattern)
