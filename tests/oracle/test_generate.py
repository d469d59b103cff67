"""Greedy answers, token for token, against `generate` of the library that defines the families."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_params, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_parity import export, opened, ours_of  # noqa: E402

from hybrid_attn import config  # noqa: E402
from hybrid_attn.infer.engine import Engine, EngineOptions  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir())  # windows of 5 in those that have one
NEW = 20
LENGTHS = (1, 4, 5, 6, 23, 40)  # of prompts: within a window, as long, longer, in several chunks


def ours(model, params, prompts):
    c = config.build({**config.to_dict(tiny({"train.dtype": "float32"})), "model": config.to_dict(model)})
    engine = Engine(params, c, EngineOptions(chunk=16))
    return [answer.tokens.tolist() for answer in engine.generate(prompts, NEW)]


def theirs(model, prompts):
    """Each prompt on its own, so that no padding can matter."""
    answers = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        mask = torch.ones_like(given)
        whole = model.generate(given, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        answers.append(whole[0, len(prompt) :].tolist())
    return answers


def assert_same_answers(ours, theirs):
    assert [len(answer) for answer in theirs] == [NEW] * len(LENGTHS)
    assert len({token for answer in theirs for token in answer}) > 5
    assert ours == theirs


def prompts_of(words):
    rng = np.random.default_rng(words)
    return [rng.integers(0, words, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_continued_as_by_its_own_implementation(case):
    with jax.set_mesh(mesh_of()):
        model, params = ours_of(GOLDEN / case)
        found = ours(model, params, prompts_of(model.vocab_size))
    library = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / case, dtype=torch.float32).eval()
    assert_same_answers(found, theirs(library, prompts_of(model.vocab_size)))


@pytest.mark.parametrize("pattern", ["LLLG", "GL"])
def test_a_model_made_here_is_continued_as_its_export(pattern, tmp_path):
    model = tiny({"model.pattern": pattern, "model.num_layers": 5, "model.vocab_size": 61}).model
    with jax.set_mesh(mesh_of()):
        params = random_params(model)
        found = ours(model, params, prompts_of(61))
        library = opened(export(tmp_path / "out", model, params, None))
    assert_same_answers(found, theirs(library, prompts_of(61)))
