"""Writes tests/golden: tiny models of every family with the logits of their own implementation. Needs the extra `oracle`.

    python tools/make_golden.py --out=tests/golden

Each case is a directory with config.json in one of its existing spellings, model.safetensors in bfloat16 (the parameters are
rounded first, so they are exact), and golden.npz with tokens [B, T], mask [B, T] (0 is padding) and float32 logits [B, T, V].
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

from hybrid_attn.convert import families

OUT = flags.DEFINE_string("out", "tests/golden", "Directory of the cases.")
ONLY = flags.DEFINE_list("cases", None, "The cases to write; by default all.")
WINDOW, LENGTH = 5, 23
SIZES = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LOCAL, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.5}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8, "sliding_window": WINDOW}
CASES = {
    "cohere2": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "logit_scale": 0.25,
                "layer_types": [LOCAL, LOCAL, LOCAL, FULL], "sliding_window": WINDOW},
    "cohere2_older": {"num_hidden_layers": 5, "sliding_window_pattern": 3, "rope_theta": 50000.0, "rope_scaling": None,
                      "sliding_window": WINDOW, "logit_scale": 1.0, "use_gated_activation": True, "rotary_pct": 1.0},
    "cohere": {"rope_theta": 100.0, "logit_scale": 0.125, "use_qk_norm": False},
    "cohere_qk_norm": {"rope_parameters": PLAIN, "logit_scale": 0.8333, "use_qk_norm": True, "num_hidden_layers": 2},
    "llama": {"rope_theta": 100.0},
    "llama_llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 10},
    "llama_yarn": {"rope_parameters": YARN | {"rope_theta": 100.0}},
    "smollm3": {"rope_theta": 100.0},
    "smollm3_window": {"rope_parameters": PLAIN, "no_rope_layers": [1, 0, 1, 1], "layer_types": [LOCAL, FULL, FULL, LOCAL],
                       "use_sliding_window": True, "sliding_window": WINDOW, "tie_word_embeddings": False},
    "exaone4": {"rope_theta": 1000.0, "rope_scaling": LLAMA3, "sliding_window": WINDOW, "sliding_window_pattern": 4},
    "exaone4_full": {"rope_parameters": PLAIN, "sliding_window": None, "layer_types": [FULL] * 4, "tie_word_embeddings": True},
    "olmo3": {"rope_parameters": {LOCAL: PLAIN, FULL: YARN | {"rope_theta": 100.0}}, "sliding_window": WINDOW,
              "num_key_value_heads": 4},
    "olmo3_older": {"rope_theta": 500000, "rope_scaling": YARN | {"attention_factor": 1.2}, "sliding_window": WINDOW,
                    "layer_types": [LOCAL, FULL, LOCAL, FULL]},
    "gemma3_text": {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                    "sliding_window_pattern": 3, "sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 10,
                    "final_logit_softcapping": 2.0, "num_hidden_layers": 5},
    "afmoe": {"rope_theta": 100.0, "num_dense_layers": 4, "sliding_window": WINDOW, "head_dim": 8, "mup_enabled": True},
    "granite_swa": MULTIPLIERS | {"rope_parameters": PLAIN, "layer_rope_theta": [0, 100.0, 500.0, 100.0],
                                  "sliding_window": WINDOW},
    "ministral3": {"rope_parameters": YARN | {"rope_theta": 100.0, "llama_4_scaling_beta": 0.5,
                                              "original_max_position_embeddings": 8}, "head_dim": 8},
    "ministral3_window": {"rope_parameters": PLAIN | {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 4},
                          "sliding_window": WINDOW, "head_dim": 8, "tie_word_embeddings": True},
    "cohere2_moe": {"rope_theta": 50.0, "logit_scale": 0.25, "sliding_window": WINDOW, "head_dim": 8, "num_hidden_layers": 5,
                    "first_k_dense_replace": 1, "prefix_dense_intermediate_size": 12, "num_experts": 5, "num_shared_experts": 2,
                    "expert_selection_fn": "sigmoid"},
    "cohere2_moe_rms": {"rope_theta": 50.0, "logit_scale": 0.25, "sliding_window": WINDOW, "head_dim": 8, "num_experts": 6,
                        "rms_norm_eps": 1e-6, "layer_types": [LOCAL, FULL] * 2, "num_experts_per_tok": 3,
                        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "prefix_dense_sliding_window_pattern": 2},
    "granitemoe_swa": MULTIPLIERS | {"rope_parameters": PLAIN, "layer_rope_theta": [0, 100.0, 100.0, 100.0, 0],
                                     "sliding_window": WINDOW, "num_local_experts": 4, "shared_intermediate_size": 28,
                                     "num_hidden_layers": 5},
    "afmoe_experts": EXPERTS | {"rope_theta": 100.0, "mup_enabled": True, "num_shared_experts": 2, "route_scale": 2.0,
                                "num_dense_layers": 2, "global_attn_every_n_layers": 3, "num_hidden_layers": 6},
    "exaone_moe": EXPERTS | {"rope_theta": 100.0, "sliding_window_pattern": 3, "first_k_dense_replace": 1},
    "kolibri1": EXPERTS | {"rope_parameters": PLAIN, "shared_expert_intermediate_size": 9, "num_hidden_layers": 5},
    "gpt_oss": EXPERTS | {"rope_parameters": YARN | {"rope_theta": 100.0, "truncate": False}, "num_local_experts": 5,
                          "intermediate_size": 12, "swiglu_limit": 0.5},
}  # fmt: skip


def random_model(directory: Path, seed: int):
    """The model that the library builds from config.json, with random parameters rounded to bfloat16."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            random = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 or (parameter.ndim == 2 and parameter.shape[0] < 8):  # norms and routers
                random = parameter + 0.3 * random
            else:
                random *= 1.0 / parameter.shape[-1] ** 0.5
            parameter.copy_(random.bfloat16().float())
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_((0.2 * torch.randn(buffer.shape, generator=generator)).bfloat16().float())
    return model


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of three sequences: full, padded on the left, padded on the right."""
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (3, LENGTH), np.int32)
    mask = np.ones_like(tokens)
    mask[1, :4], mask[2, -6:] = 0, 0
    return tokens, mask


def main(_):
    import torch

    for seed, (case, fields) in enumerate(CASES.items()):
        if ONLY.value and case not in ONLY.value:
            continue
        directory = Path(OUT.value) / case
        directory.mkdir(parents=True, exist_ok=True)
        model_type = next(x for x in sorted(families.FAMILIES, key=len, reverse=True) if case.startswith(x))
        values = {"model_type": model_type, **SIZES, **fields}
        (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n")
        model = random_model(directory, seed)
        tokens, mask = batch(seed)
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
        logits = out.logits.float().numpy() * mask[..., None]  # zero where there is padding
        np.savez_compressed(directory / "golden.npz", tokens=tokens, mask=mask, logits=logits)
        with tempfile.TemporaryDirectory() as saved:  # with a config.json in today's spelling
            model.bfloat16().save_pretrained(saved)
            shutil.copyfile(Path(saved) / "model.safetensors", directory / "model.safetensors")
        print(case)


if __name__ == "__main__":
    app.run(main)
