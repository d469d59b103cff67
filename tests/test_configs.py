"""The configs of published models have the published sizes, and those of the paper are its variants."""

import functools
import importlib
import json
import math
import re
from pathlib import Path

import pytest

from configs import hybrid_8k, recall
from hybrid_attn import config, config_file, trees
from hybrid_attn.convert import families
from hybrid_attn.data import corpora, pipeline
from hybrid_attn.data import tokenizer as tokenizers
from hybrid_attn.data.tokenizer import check_vocab, load_tokenizer
from hybrid_attn.model import execution_on, flops
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import loop
from hybrid_attn.train.console import description

ROOT = Path(__file__).parents[1]
R7B = {
    "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 50000.0, "rope_scaling": None,
    "sliding_window": 4096, "sliding_window_pattern": 4, "layer_switch": 4, "logit_scale": 0.25, "layer_norm_eps": 1e-5,
    "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0,
    "use_parallel_block": True, "use_embedding_sharing": True, "use_gated_activation": True, "attention_bias": False,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 8192, "cache_implementation": "hybrid",
}  # fmt: skip
COMMAND_A = R7B | {"hidden_size": 12288, "intermediate_size": 36864, "num_hidden_layers": 64, "num_attention_heads": 96}
LAYER_TYPES = [*["sliding_attention"] * 3, "full_attention"] * 9
AYA = R7B | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 4}
AYA |= {"vocab_size": 262144, "num_hidden_layers": 36, "logit_scale": 1.0, "layer_types": LAYER_TYPES}
AYA.pop("sliding_window_pattern")


def model_of(name: str, *args) -> config.Model:
    return config.build(importlib.import_module(f"configs.{name}").get_config(*args)).model


@pytest.mark.parametrize(
    ("name", "billions", "published"),
    [("command_r7b", 8.028, R7B), ("command_a", 111.058, COMMAND_A), ("tiny_aya", 3.349, AYA)],
)
def test_published_models_have_their_number_of_parameters_and_equal_their_config_json(name, billions, published):
    model = model_of(f"models.{name}")
    assert round(flops.parameters(model) / 1e9, 3) == billions
    assert families.model_of(published) == model  # so that a run with this config goes on from imported weights


@pytest.mark.parametrize("size", hybrid_8k.SIZES)
@pytest.mark.parametrize(
    ("name", "layers", "parameters_of_norms"),
    [("rope", "RRRR", False), ("qk_norm", "RRRR", True), ("nope", "GGGG", False), ("rnope", "RGRG", False),
     ("rnope_swa", "LLLG", False)],
)  # fmt: skip
def test_variants_of_the_paper_differ_in_nothing_but_their_layers(name, layers, parameters_of_norms, size):
    model, hybrid = model_of(f"paper.{name}", size), model_of("hybrid_8k", size)
    assert model.layers == layers * (model.num_layers // 4) and set(model.kinds) == set(layers)
    kinds = [model.kinds[letter] for letter in layers]
    assert [kind.window for kind in kinds] == [hybrid.kinds["L"].window if letter == "L" else None for letter in layers]
    assert [kind.rope_theta for kind in kinds] == [None if letter == "G" else 10_000.0 for letter in layers]
    assert {kind.qk_norm for kind in kinds} == {"layernorm" if parameters_of_norms else "none"}
    lines = families.differences(model, hybrid)
    assert all(line.startswith("  model.kinds.") for line in lines)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [("rnope_swa", "LLLG"), ("rnope_swa_1to1", "LGLG"), ("rnope", "RGRG"), ("swa_rope", "LLLR"), ("swa_rope_1to1", "LRLR"),
     ("rope", "RRRR"), ("qk_norm", "QQQQ"), ("nope", "GGGG"), ("swa", "LLLL")],
)  # fmt: skip
def test_layouts_of_the_recall_probe_differ_in_nothing_but_their_layers(layout, layers):
    c, default = (config.build(recall.get_config(*argument)) for argument in ((layout,), ()))
    assert len(recall.LAYOUTS) == 9 and c.model.layers == layers and set(c.model.kinds) == set(layers)
    for letter, kind in c.model.kinds.items():
        assert kind.window == (16 if letter == "L" else None)
        assert kind.rope_theta == (None if letter == "G" else 10_000.0)
    lines = trees.differences(config.to_dict(default), config.to_dict(c))
    assert all(line.startswith(("model.kinds.", "model.pattern: ")) for line in lines)
    weights_of_norms = 4 * 2 * 4 * 16 if layout == "qk_norm" else 0  # layers, queries and keys, heads, head size
    assert flops.parameters(c.model) == flops.parameters(default.model) + weights_of_norms


# The others have sizes; extend and adapt need a checkpoint, and end_to_end (tests/test_end_to_end.py) needs stores.
ARGUMENTS = {"recall": list(recall.LAYOUTS), "command_a": ["full", "tiny"], "moe": ["small", "30b"]}
ARGUMENTS |= dict.fromkeys(("extend", "adapt", "end_to_end"), [])
ARGUMENTS |= {"bench": ["", "olmo3"]} | dict.fromkeys(("models", "base", "mup"), [""])
ARGUMENTS |= {
    "dense": ["tiny,seed", "2b,tables"],
    "mixture": ["tiny,sparse", "tiny,bam", "tiny,nexus_extended", "tiny,linear", "590m,btx"],
}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py"))
SHIPPED = [
    f"{path}{':' * bool(argument)}{argument}"
    for path in FILES
    for argument in ARGUMENTS.get(path.parent.name, ARGUMENTS.get(path.stem, hybrid_8k.SIZES))
]
BETWEEN = ":150m", ":1b"  # sizes whose shrunken forms differ from those of small and 8b in rates and query heads alone


def is_alike(name):
    """Whether a config differs from another one in layers or numbers alone: it is left to `make test-exhaustive`."""
    if "paper/" in name or "recall.py:" in name or "models/" in name:
        return name not in ("configs/models/tiny_aya.py", "configs/recall.py:rnope_swa")
    ends = "base.py", "bench.py:olmo3", "rope_8k.py:8b", "command_a.py:full", "tiny,linear", "tiny,nexus_extended", "2b,tables"
    return name.endswith((":small", *BETWEEN, *ends))


ALL = [pytest.param(x, marks=pytest.mark.exhaustive if is_alike(x) else pytest.mark.slow) for x in SHIPPED]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty documents, and tokenizers of them of 300, 32,768 and 131,072 ids: most stand for nothing."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(10 + i)))
    read = tokenizers.texts([str(folder / "*.txt")], tokenizers.Fields("text", None))
    trained = json.loads(tokenizers.train(read, 300).to_str())
    for size in (300, 32_768, 131_072):
        more = {f"unused {i}": i for i in range(len(trained["model"]["vocab"]), size)}
        values = trained | {"model": trained["model"] | {"vocab": trained["model"]["vocab"] | more}}
        (folder / f"{size}.json").write_text(json.dumps(values))
    return folder


def shipped(name, texts, **overrides):
    """A shipped config with the documents, and other flags as --config.KEY=VALUE."""
    values = config_file.load(str(ROOT / name))
    if "recall" not in name:
        overrides |= {f"data.sources.{source}.paths": f"{texts}/*.txt" for source in values["data"]["sources"]}
    for key, text in overrides.items():
        trees.override(config.Config, values, "config", key, str(text))
    return values


read_once = functools.cache(load_tokenizer)


@pytest.fixture
def started(monkeypatch):
    """Has a run end where it makes its parameters, by an error of this type."""

    class Started(Exception):
        pass

    def start(*_):
        raise Started

    monkeypatch.setattr(loop, "first_state", start)
    monkeypatch.setattr(loop, "load_tokenizer", read_once)
    return Started


def test_all_configs_are_tested():
    assert len(SHIPPED) == 59


@pytest.mark.parametrize("name", ALL)
def test_a_shipped_config_starts_with_a_tokenizer_of_half_its_vocabulary_and_says_how_to_get_one(
    name, texts, tmp_path, started
):
    ids = shipped(name, texts)["model"]["vocab_size"]
    overrides = {"mesh.tensor": 1}
    for i in range(len(shipped(name, texts)["stages"])):
        overrides |= {f"stages[{i}].batch": 8, f"stages[{i}].microbatches": 1, f"stages[{i}].override.mesh": "{}"}
    if ids > 384:
        with pytest.raises(
            ValueError, match=f"train_tokenizer.py --vocab_size={ids} and name it with --config.data.tokenizer="
        ):
            loop.train(config.build(shipped(name, texts, **overrides)), tmp_path)
        overrides |= {"data.tokenizer": texts / ("32768.json" if ids == 65_536 else "131072.json")}
    c = config.build(shipped(name, texts, **overrides))
    with pytest.raises(started):
        loop.train(c, tmp_path)
    tokenizer = read_once(c.data.tokenizer)
    training = {name: corpus.training for name, corpus in corpora.load(c.data, c.sources, tokenizer).items()}
    rows = pipeline.stage_sequences(c, training, tokenizer)
    lines = description(c, execution_on("cpu", c.model, c.train), make_mesh(c.mesh), "", rows, "", 0)
    assert lines[0].startswith("parameters   ") and len(lines) >= 10


def shrunk(name, texts):
    """A shipped config with narrow layers, few of them, short sequences and its last two stages; its layout and optimiser."""
    values = shipped(name, texts)
    model, stages = values["model"], values["stages"]
    groups = min(model["num_heads"] // model["num_kv_heads"], 4)
    if model["vocab_size"] > 384:
        values["data"]["tokenizer"] = str(texts / "300.json")
    model |= {"vocab_size": 384, "num_layers": min(model["num_layers"], 4), "d_model": 32, "d_ff": 48}
    model |= {"num_heads": 2 * groups, "num_kv_heads": 2, "head_dim": 8}
    for kind in model["kinds"].values():
        kind["window"] = kind["window"] and min(kind["window"], 16)
        kind["mlp"]["d_ff"] = kind["mlp"]["d_ff"] and 24
    del stages[:-2]
    for i, stage in enumerate(stages):
        stage |= {"steps": 2 // len(stages), "seq_len": 64 * 2**i, "batch": 8, "microbatches": 1}
        stage["override"].pop("mesh", None)
    values["mesh"]["tensor"] = 1
    values["train"] |= {"log_every": 1}
    values["evals"] |= {"names": ()}
    return values


@pytest.mark.parametrize("name", [x for x in ALL if not x.values[0].endswith(BETWEEN)])  # each compiles a step
def test_shrunken_forms_of_the_shipped_configs_train(name, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda *_: (1e11, "measured"))
    c = config.build(shrunk(name, texts))
    assert loop.train(c, tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, c.total_steps + 1)) and c.total_steps >= 2
    assert all(0 < line["loss"] < 2 * math.log(384) for line in logged)


COMMAND = re.compile(r"(?:--config=|CONFIG=)(configs/[\w/]+\.py(?::\w+(?:,\w+)?)?)(.*)")
TEXTS = ("Makefile", "*.md", "docs/**/*.md", "launch/*.*", "tools/*.py", "hybrid_attn/commands/*.py", "configs/**/*.py")
WITHOUT_DATA = "plan.py", "import_hf.py", "show_recipe.py", "compare_layouts.py", "compare_meshes.py"  # programs of tools/


def test_every_command_of_the_documentation_names_a_config_and_the_tokenizer_that_its_vocabulary_needs(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line for text in TEXTS for path in ROOT.glob(text) for line in path.read_text().splitlines() if "$" not in line]
    commands = [(line, *match.groups()) for line in lines if (match := COMMAND.search(line))]
    assert len(commands) > 30
    for line, name, arguments in commands:
        if "extend.py" in name or "adapt.py" in name:
            continue  # these need a checkpoint
        values = config_file.load(name)
        for key, text in re.findall(r"--config\.([\w.\[\]-]+)=([^\s'\"`]+)", arguments):
            trees.override(config.Config, values, "config", key, text)
        c = config.build(values)
        if c.data.tokenizer == "bytes" and not any(tool in line for tool in WITHOUT_DATA):
            check_vocab(load_tokenizer("bytes"), c.model.vocab_size, "bytes")
