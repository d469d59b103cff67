"""LoRA against the library that defines its files: the same logits in both directions."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_params, tiny
from converted import write
from flax.traverse_util import flatten_dict, unflatten_dict
from test_parity import assert_same_logits, batch_of, opened, our_logits, their_logits

torch = pytest.importorskip("torch")
library = pytest.importorskip("peft")

from hybrid_attn.config import NO_ADAPTER  # noqa: E402
from hybrid_attn.convert import peft  # noqa: E402
from hybrid_attn.model import specs, transforms  # noqa: E402

TARGETS = ("*/attention/?", "*/mlp/*")


def base_of(model_type: str):
    """A hybrid of cohere2, or a model of llama."""
    if model_type == "cohere2":
        changes = {"model.num_layers": 5, "model.pattern": "LLG", "model.vocab_size": 61}
        return tiny(changes, L={"window": 5, "rope_theta": 100.0}).model
    fields = {"block": "pre", "norm": "rms", "rope_layout": "half", "tie_embeddings": False, "pattern": "G", "vocab_size": 61}
    return tiny({f"model.{name}": x for name, x in fields.items()}, G={"rope_theta": 100.0}).model


def matrices_of(model):
    flat = flatten_dict(specs(model), sep="/")
    return {name: peft.Matrix(x.shape, x.fan_in) for name, x in flat.items() if transforms.is_plain(x)}


@pytest.mark.parametrize("model_type", ["cohere2", "llama"])
def test_our_adapter_has_the_same_logits_there(model_type, tmp_path, one_device):
    base = base_of(model_type)
    model = dataclasses.replace(base, adapter=dataclasses.replace(NO_ADAPTER, type="lora", targets=TARGETS, rank=3, alpha=6.0))
    params = random_params(model)
    flat = flatten_dict(params, sep="/")
    plain = unflatten_dict({name: x for name, x in flat.items() if not transforms.is_added(name)}, sep="/")
    write(tmp_path / "base", base, plain, model_type)
    names = {name.partition(transforms.SUFFIX)[0] for name in flat if transforms.is_added(name)}

    def read(name, part):
        x = np.asarray(flat[f"{name}{transforms.SUFFIX}/{part}"])
        return x if name.startswith("periods/") else [x]

    (tmp_path / "adapter").mkdir()
    peft.write(tmp_path / "adapter", model, model_type, {name: flat[name].shape for name in sorted(names)}, read)
    theirs = library.PeftModel.from_pretrained(opened(tmp_path / "base"), tmp_path / "adapter").eval()
    tokens, mask = batch_of(17)
    expected = their_logits(theirs, tokens, mask)
    assert_same_logits(our_logits(model, params, tokens, mask), expected, model_type)
    assert np.abs(our_logits(base, plain, tokens, mask) - expected).max() > 0.1


@pytest.mark.parametrize("model_type", ["cohere2", "llama"])
def test_an_adapter_of_the_library_has_the_same_logits_here(model_type, tmp_path, one_device):
    base = base_of(model_type)
    params = random_params(base)
    write(tmp_path / "base", base, params, model_type)
    settings = library.LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = library.get_peft_model(opened(tmp_path / "base"), settings).eval()
    torch.manual_seed(0)
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    adapter, arrays = peft.read(tmp_path / "adapter", base, model_type, matrices_of(base))
    flat = flatten_dict(params, sep="/")
    flat |= {f"{name}{transforms.SUFFIX}/{part}": jnp.asarray(x) for name, of in arrays.items() for part, x in of.items()}
    tokens, mask = batch_of(17)
    ours = our_logits(dataclasses.replace(base, adapter=adapter), unflatten_dict(flat, sep="/"), tokens, mask)
    assert_same_logits(ours, their_logits(theirs, tokens, mask), model_type)
