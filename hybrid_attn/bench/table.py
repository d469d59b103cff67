"""The table of the parts of the benchmark: a name is a file of this folder with one `PART`. To add one, add its row."""

import importlib

from hybrid_attn.trees import check

PARTS = {
    "attention": "one layer's kernel, forward and backward, beside jax.nn and PyTorch",
    "experts": "feed-forwards of experts, forward and backward, beside ragged_dot and a dense one",
    "step": "a training step beside transformers",
    "layouts": "a training step beside full attention",
    "statistics": "a training step with statistics beside one without",
    "pieces": "where the time of a training step goes",
    "prefill": "reading a prompt beside transformers",
    "decode": "a new token beside transformers",
    "peers": "steps and decoded tokens beside transformers and MaxText, each in a process of its own: time, memory, start",
    "growth": "a new token after prompts of growing length, beside full attention",
    "cache": "bytes of the KV cache beside full attention",
    "long": "a prompt of 131,072 tokens: time and memory",
    "start": "from the command to the first step, imports and --help",
}


def find(name: str):
    """The `Part` of a name; ValueError for one that is not in the table. Only the files of parts that are used are imported."""
    check(name in PARTS, f"--part has {name!r}; known: {', '.join(PARTS)}")
    return importlib.import_module(f"hybrid_attn.bench.{name}").PART
