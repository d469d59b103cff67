"""Objectives against the libraries that define them: losses and gradients of DPOTrainer of TRL, and of transformers for SFT.

TRL's sigmoid is dpo, its ipo and hinge are trl_ipo and trl_hinge. Of a single pair its aot is dpo with label smoothing, and its
sft is the mean negative log-probability of the chosen completion. The ipo and hinge of the study have no equal there.
"""

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import BLOCKED, on_mesh, random_params, tiny
from converted import write
from test_parity import opened
from test_peft import base_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from configs import base  # noqa: E402
from hybrid_attn import config  # noqa: E402
from hybrid_attn.train.objectives import objective_of  # noqa: E402
from hybrid_attn.train.step import init_state, loss_and_gradient  # noqa: E402

LENGTH, VOCABULARY, EOS = 40, 61, 1
# Tokens of the prompt, of the chosen and of the rejected completion without EOS.
SIZES = (3, 4, 6), (5, 1, 2), (2, 7, 3), (6, 2, 5)
TRL = {
    "dpo": ({"loss_type": ["sigmoid"], "beta": 0.3}, {"beta": 0.3}),
    "trl_ipo": ({"loss_type": ["ipo"], "beta": 0.4}, {"beta": 0.4}),
    "trl_hinge": ({"loss_type": ["hinge"], "beta": 0.2}, {"beta": 0.2}),
}
OF_ONE_PAIR = {
    "dpo": ({"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "label_smoothing": 0.2}),
    "trl_ipo": ({"loss_type": ["ipo", "sft"], "beta": 0.4, "loss_weights": [1.0, 0.5]}, {"beta": 0.4, "nll": 0.5}),
}


def drawn_pairs():
    """(prompt, chosen, rejected) of token ids; both completions end with EOS."""
    rng = np.random.default_rng(0)
    drawn = [[rng.integers(2, VOCABULARY, n).tolist() for n in sizes] for sizes in SIZES]
    return [(prompt, [*chosen, EOS], [*rejected, EOS]) for prompt, chosen, rejected in drawn]


def packed(rows):
    """The batch of rows of documents, each a prompt and a completion that is trained on."""
    arrays = {
        name: np.zeros((len(rows), LENGTH), np.int32) for name in ("tokens", "targets", "positions", "segments", "weights")
    }
    for b, row in enumerate(rows):
        begin = 0
        for segment, (prompt, completion) in enumerate(row, 1):
            ids = [*prompt, *completion]
            here = slice(begin, begin + len(ids))
            arrays["tokens"][b, here], arrays["segments"][b, here] = ids, segment
            arrays["positions"][b, here] = range(len(ids))
            arrays["targets"][b, begin : here.stop - 1] = ids[1:]
            arrays["weights"][b, begin + len(prompt) - 1 : here.stop - 1] = 1
            begin = here.stop
    arrays["weights"] = arrays["weights"].astype(np.float32)
    return on_mesh(arrays | {"bytes": arrays["weights"]})


def rows_of(pairs, number):
    """The documents of pairs, so many pairs in a row."""
    halves = [[(prompt, chosen), (prompt, rejected)] for prompt, chosen, rejected in pairs]
    return [sum(halves[i : i + number], []) for i in range(0, len(halves), number)]


def ours(model, params, reference, stage, batch):
    """The loss and its gradient by the objective of a stage."""
    of_stage = {"steps": 1, "seq_len": LENGTH, "batch": len(batch["tokens"]), "microbatches": 1, "mixture": {}} | stage
    c = config.build(config.to_dict(tiny({"stages": [of_stage]})) | {"model": config.to_dict(model)})
    extras = {} if reference is None else {"reference": reference}
    state = init_state(c, params)._replace(extras=extras)
    objective = objective_of(c.at(0))
    (loss, _), gradient = jax.jit(lambda state, batch: loss_and_gradient(c.at(0), BLOCKED, objective, state, batch))(
        state, batch
    )
    return float(loss), gradient


def trainer_of(folder, model, reference, pairs, settings):
    """TRL's trainer on these pairs, with a tokenizer of words that stand for ids."""
    names = ["pad", "end", *(f"w{i}" for i in range(2, VOCABULARY))]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="pad"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=names[EOS], pad_token="pad")

    def text(ids):
        return "".join(f" {names[i]}" for i in ids)

    data = datasets.Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), map(text, pair), strict=True)) for pair in pairs]
    )
    options = trl.DPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
        **settings,
    )
    trainer = trl.DPOTrainer(model, reference, args=options, train_dataset=data, processing_class=tokenizer)
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, pairs, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == [prompt, chosen, rejected]
    return trainer


def assert_same(folder, model, model_type, computed, loss, theirs):
    """`computed` is our loss and gradient; the library's are `loss`, and those of the parameters of its model `theirs`."""
    assert computed[0] == pytest.approx(loss.item(), rel=2e-5)
    loss.backward()
    write(folder / "gradient", model, computed[1], model_type)
    gradients = {
        k: x for path in (folder / "gradient").glob("*.safetensors") for k, x in safetensors.numpy.load_file(path).items()
    }
    expected = {name: x.grad.numpy() for name, x in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, x in expected.items():
        assert np.abs(x).max() > 1e-6, name
        np.testing.assert_allclose(gradients[name], x, atol=2e-5 * np.abs(x).max() + 1e-7, rtol=2e-4, err_msg=name)


@pytest.fixture(params=["llama", "cohere2"])
def models(request, tmp_path, one_device):
    """A model, its type, and parameters and folder of the trained one and of the reference."""
    model, names = base_of(request.param), ("model", "reference")
    both = [random_params(model, seed) for seed in range(2)]
    folders = [write(tmp_path / name, model, x, request.param) for name, x in zip(names, both, strict=True)]
    return model, request.param, *zip(both, folders, strict=True)


@pytest.mark.parametrize("name, number", [("dpo", 1), ("dpo", 2), ("trl_ipo", 2), ("trl_hinge", 2)])
def test_a_batch_of_pairs_has_the_loss_and_the_gradient_of_trl(name, number, models, tmp_path):
    """`number` pairs in a sequence: one with padding, or two that are packed."""
    model, model_type, (params, folder), (reference, of_reference) = models
    pairs, (theirs, settings) = drawn_pairs(), TRL[name]
    stage = {"objective": name, "preference": base.preference(**settings)}
    computed = ours(model, params, reference, stage, packed(rows_of(pairs, number)))
    trainer = trainer_of(tmp_path, opened(folder), opened(of_reference), pairs, theirs)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert_same(tmp_path, model, model_type, computed, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("name", OF_ONE_PAIR)
def test_a_pair_has_the_smoothed_loss_and_the_sum_with_nll_of_trl(name, models, tmp_path):
    model, model_type, (params, folder), (reference, of_reference) = models
    pairs, (theirs, settings) = drawn_pairs()[:1], OF_ONE_PAIR[name]
    stage = {"objective": name, "preference": base.preference(**settings)}
    computed = ours(model, params, reference, stage, packed(rows_of(pairs, 1)))
    trainer = trainer_of(tmp_path, opened(folder), opened(of_reference), pairs, theirs)
    inputs = trainer.data_collator(list(trainer.train_dataset))
    assert_same(tmp_path, model, model_type, computed, trainer.compute_loss(trainer.model, inputs), trainer.model)


@pytest.mark.parametrize("average_over", ["tokens", "documents"])
@pytest.mark.parametrize("number", [1, 2])
def test_sft_has_the_loss_and_the_gradient_of_transformers(average_over, number, models, tmp_path):
    """`number` conversations in a sequence. The library averages over tokens; over documents, it is run on each alone."""
    model, model_type, (params, folder), _ = models
    documents = [(prompt, chosen) for prompt, chosen, _ in drawn_pairs()]
    rows = [documents[i : i + number] for i in range(0, len(documents), number)]
    computed = ours(model, params, None, {"objective": "sft", "average_over": average_over}, packed(rows))
    theirs = opened(folder)

    def loss_of(part):
        ids = [torch.tensor([*prompt, *completion]) for prompt, completion in part]
        labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in part]
        padded = {"input_ids": (ids, 0), "labels": (labels, -100), "attention_mask": ([torch.ones_like(x) for x in ids], 0)}
        pad = torch.nn.utils.rnn.pad_sequence
        return theirs(**{key: pad(x, batch_first=True, padding_value=value) for key, (x, value) in padded.items()}).loss

    parts = [documents] if average_over == "tokens" else [[x] for x in documents]
    loss = sum(loss_of(part) for part in parts) / len(parts)
    assert_same(tmp_path, model, model_type, computed, loss, theirs)
