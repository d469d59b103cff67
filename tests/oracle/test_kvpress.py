"""Against kvpress 0.5.5. It asks for an older transformers than the families do, and runs with this one, so it is installed
beside `make test-oracle` without what it asks for: pip install --no-deps kvpress accelerate cachetools datasets dill fire
multiprocess pandas peft pyarrow python-dateutil requests charset_normalizer certifi urllib3 six termcolor xxhash
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
kvpress = pytest.importorskip("kvpress")

from hybrid_attn.infer.cache import compress  # noqa: E402
from hybrid_attn.infer.cache.compress import Compression, Scoring  # noqa: E402

B, N, K, H, S, W, CAP = 2, 6, 2, 8, 64, 7, 16
LENGTHS = jnp.full(B, S)


def module(layers: int = 1, layer: int = 0):
    """What a press reads of an attention layer whose queries are its inputs and carry no positions."""
    config = SimpleNamespace(
        num_attention_heads=N, num_key_value_heads=K, num_hidden_layers=layers, _attn_implementation="sdpa"
    )
    return SimpleNamespace(config=config, head_dim=H, q_proj=torch.nn.Identity(), layer_idx=layer)


@pytest.fixture
def inputs():
    """What `score` and `compress` of a press take, and the same for ours."""
    rng = np.random.default_rng(0)
    q_BSNH, k_BKSH, v_BKSH = (rng.normal(size=x).astype(np.float32) for x in ((B, S, N, H), (B, K, S, H), (B, K, S, H)))
    k, v, hidden = torch.tensor(k_BKSH), torch.tensor(v_BKSH), torch.tensor(q_BSNH.reshape(B, S, N * H))
    places = {"position_embeddings": (torch.ones(B, S, H), torch.zeros(B, S, H))}
    return (hidden, k, v, None, places), (jnp.asarray(q_BSNH[:, -W:]), jnp.asarray(k_BKSH), jnp.asarray(v_BKSH))


def ours(c: Compression, q_BWNH, k_BKSH):
    """Scores, and which slots are kept, as a mask."""
    scores_BKS = compress.scores(c, None, q_BWNH, k_BKSH, LENGTHS, Scoring(H**-0.5))
    kept_BK = compress.counts(c, scores_BKS, compress.budgets(c, LENGTHS, 1)[0])
    index_BKC = np.asarray(compress.kept_slots(scores_BKS, kept_BK, int(kept_BK.max())))
    return np.asarray(scores_BKS), (index_BKC[..., None] == np.arange(S)).any(2), index_BKC


@pytest.mark.parametrize("kernel", [1, 5])
def test_snapkv_scores_and_keeps_what_kvpress_does(inputs, kernel):
    theirs, (q_BWNH, k_BKSH, v_BKSH) = inputs
    press = kvpress.SnapKVPress(1 - CAP / S, window_size=W, kernel_size=kernel)
    scores_BKS, _, index_BKC = ours(Compression("snapkv", cap=CAP, window=W, kernel=kernel), q_BWNH, k_BKSH)
    wanted_BKS = W * press.score(module(), *theirs).numpy()  # theirs is the mean over the window
    np.testing.assert_allclose(scores_BKS[..., :-W], wanted_BKS[..., :-W], rtol=2e-5)
    for got, wanted in zip(compress.compacted((k_BKSH, v_BKSH), index_BKC), press.compress(module(), *theirs), strict=True):
        in_order = np.take_along_axis(wanted.numpy(), np.argsort(wanted.numpy()[..., :1], axis=2), axis=2)
        assert np.array_equal(np.take_along_axis(np.asarray(got), np.argsort(got[..., :1], axis=2), axis=2), in_order)


def test_streaming_keeps_what_kvpress_does(inputs):
    theirs, (_, k_BKSH, v_BKSH) = inputs
    _, _, index_BKC = ours(Compression("streaming", cap=CAP, sinks=3), None, k_BKSH)
    wanted = kvpress.StreamingLLMPress(1 - CAP / S, n_sink=3).score(module(), *theirs).numpy()
    assert np.array_equal((index_BKC[..., None] == np.arange(S)).any(2), wanted == 1)


@pytest.mark.parametrize("floor", [0.2, 0.7])
def test_adakv_keeps_what_kvpress_does(inputs, floor):
    theirs, (q_BWNH, k_BKSH, _) = inputs
    layer = module()
    press = kvpress.AdaKVPress(kvpress.SnapKVPress(1 - CAP / S, window_size=W), alpha_safeguard=floor)
    press.compress(layer, *theirs)
    wanted_BKS = np.ones((B, K, S), bool)
    wanted_BKS[tuple(x.numpy() for x in layer.masked_key_indices)] = False
    _, kept_BKS, _ = ours(Compression("adakv", cap=CAP, window=W, floor=floor), q_BWNH, k_BKSH)
    assert np.array_equal(kept_BKS, wanted_BKS) and len(set(kept_BKS.sum(-1).flat)) > 1


@pytest.mark.parametrize("length, beta", [(256, 2), (1024, 3), (128, 16)])
def test_a_pyramids_budgets_are_those_of_kvpress_beside_the_window(length, beta):
    """Theirs count the window in, as the layers' mean does; the authors' own code, and ours, keep it besides."""
    c = Compression("pyramid", cap=64 + W, window=W, beta=beta)
    press = kvpress.PyramidKVPress(1 - 64 / length, window_size=W, beta=beta)
    wanted = [press.get_layer_budget(module(5, layer), length) + W for layer in range(5)]
    assert compress.budgets(c, [length], 5)[:, 0].tolist() == wanted and wanted[0] > wanted[-1]
