"""Key tokens are those whose loss falls by more than two nats when the far context is there, found here token by token."""

import math

import jax
import numpy as np
import pytest
from conftest import BLOCKED, mesh_of, on_mesh, random_params, tiny

from hybrid_attn.data.documents import in_memory
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import EvalModel, Spec, keytokens
from hybrid_attn.model import losses

LENGTH, SHORT, SLIDE = 48, 9, 3  # windows of 12 tokens, of which every shard of context has two slices


def eval_model_on(mesh):
    """A model that says nothing but four letters, by what it attends to: some losses are small, and many change."""
    model = tiny({"model.logit_scale": 12.0}, G={"temperature.type": "log_length", "temperature.length": 3}).model
    params = random_params(model)
    letters = (np.arange(model.vocab_size) < 4)[:, None]
    for layer in params["periods"].values():
        layer["attention"]["o"] *= 10
    params["embed"] = jax.device_put(np.asarray(params["embed"]) * letters, params["embed"].sharding)
    return EvalModel(model, params, BLOCKED._replace(kernel="reference", zigzag=True), mesh, ByteTokenizer())


def documents():
    rng = np.random.default_rng(0)
    lengths = (150, 9, 35, 60, 40)
    return in_memory([rng.integers(0, 4, n).astype(np.uint16) for n in lengths], range(len(lengths)))


def losses_of(eval_model, tokens, targets):
    """Losses [T] of the tokens of a document that begins with them."""
    row = {"tokens": tokens, "targets": targets, "positions": np.arange(len(tokens)), "segments": np.ones(len(tokens))}
    batch = {name: np.pad(x, (0, LENGTH - len(x)))[None].astype(np.int32) for name, x in row.items()}
    nll_BT, _ = jax.jit(losses, static_argnums=(0, 3))(
        eval_model.model, eval_model.params, on_mesh(batch), eval_model.execution
    )
    return np.asarray(nll_BT)[0, : len(tokens)]


def by_hand(eval_model, rows):
    """(losses of key tokens, tokens looked at); the short contexts of `SLIDE` neighbours begin at the same token."""
    found, looked = [], 0
    for row in rows:
        for segment in range(1, row["segments"].max() + 1):
            inside = np.flatnonzero(row["segments"] == segment)
            texts = row["tokens"], row["targets"]
            whole = losses_of(eval_model, *(text[inside] for text in texts))
            for t in inside[(inside >= SHORT) & (row["weights"][inside] > 0)]:
                first = max((t - SHORT) // SLIDE * SLIDE, inside[0])
                short = losses_of(eval_model, *(text[first : t + 1] for text in texts))[-1]
                looked += 1
                if short - whole[t - inside[0]] > 2 and whole[t - inside[0]] < 2:
                    found.append(whole[t - inside[0]])
    return np.array(found), looked


@pytest.mark.parametrize("sizes", [{}, pytest.param({"data": 2, "context": 2}, marks=pytest.mark.slow)])
def test_key_tokens_are_those_that_a_reader_of_single_tokens_finds(sizes, monkeypatch):
    monkeypatch.setattr(keytokens, "SLIDE", SHORT // SLIDE)
    spec, mesh = Spec(documents(), LENGTH, 4 * LENGTH - 5), mesh_of(**sizes)
    with jax.set_mesh(mesh):
        (record,) = keytokens.records_of(eval_model_on(mesh), spec, SHORT)
    rows = PackedSequences(spec.documents, LENGTH, None, ByteTokenizer().byte_lengths)
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        found, looked = by_hand(eval_model_on(mesh), [rows[i] for i in rows.spread(4)])
    assert 3 < len(found) < looked / 2
    assert record["tokens"] == looked and record["key_tokens"] == len(found)
    assert record["loss"] == pytest.approx(found.mean(), rel=1e-4)
    assert record["perplexity"] == pytest.approx(math.exp(found.mean()), rel=1e-4)
    assert record["length"] == LENGTH and record["short"] == SHORT


def test_two_nats_make_a_key_token_and_windows_slide_by_a_quarter_of_the_short_context(one_device, monkeypatch):
    whole, gains, sizes = np.array([1.9, 1.9, 2.1, 0.0]), np.array([2.1, 1.9, 2.1, 1.9]), set()

    def by_token(model, execution, params, batch):
        sizes.add(batch["tokens"].shape[1])
        nll = whole if batch["tokens"].shape[1] == LENGTH else whole + gains
        return jax.device_put(nll[np.asarray(batch["tokens"])], batch["tokens"].sharding)

    monkeypatch.setattr(keytokens, "_token_losses", by_token)
    spec = Spec(documents(), LENGTH, 4 * LENGTH)
    (record,) = keytokens.records_of(EvalModel(None, None, None, one_device, ByteTokenizer()), spec, 16)
    rows = PackedSequences(spec.documents, LENGTH, None, ByteTokenizer().byte_lengths)
    likely = sum(int(((row["tokens"] == 0) & (row["weights"] > 0))[16:].sum()) for row in map(rows.__getitem__, rows.spread(4)))
    assert sizes == {LENGTH, 16 + 4}
    assert record["key_tokens"] == likely > 9 and record["loss"] == pytest.approx(1.9)


def test_without_key_tokens_there_is_no_loss(one_device):
    spec = Spec(in_memory([np.arange(SHORT, dtype=np.uint16)] * 9, range(9)), LENGTH, 1)
    record = {"length": LENGTH, "short": 24, "tokens": 21, "key_tokens": 0, "loss": None, "perplexity": None}
    # No document is longer than the short context.
    assert [*keytokens.records_of(eval_model_on(one_device), spec, 24)] == [record]


@pytest.mark.parametrize("index, first", [(5, 30), (3, 10)])
def test_a_window_is_its_part_of_the_row_and_of_nothing_after_it(index, first, one_device):
    row = PackedSequences(documents(), LENGTH, None, ByteTokenizer().byte_lengths)[index]
    window = keytokens.window(24, first, on_mesh({name: x[None] for name, x in row.items()}))
    begun = np.where(row["segments"] == row["segments"][first], row["positions"][first], 0)
    for name, x in window.items():
        wanted = (row[name] - begun if name == "positions" else row[name])[first : first + 24]
        np.testing.assert_array_equal(x, np.pad(wanted, (0, 24 - len(wanted)))[None])
    assert begun[first] > 0


@pytest.mark.parametrize("short", [0, LENGTH])
def test_a_short_context_is_a_part_of_the_row(short, one_device):
    with pytest.raises(ValueError, match=f"short={short} is no part of sequences of 48 tokens; use 1 to 47"):
        next(keytokens.records_of(eval_model_on(one_device), Spec(documents(), LENGTH, 1), short))
