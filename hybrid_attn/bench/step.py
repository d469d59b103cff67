"""Training steps here and in `transformers`: the same model (ours, exported), tokens, loss and AdamW.

It runs on PyTorch with its scaled dot-product attention, on a CPU, with the extra `oracle`. It gives windowed layers a mask and
computes all S x S scores, which the column of FLOPs counts. Where its activations do not fit into --memory_gib, it recomputes
those of each layer.
"""

import tempfile

from hybrid_attn import config
from hybrid_attn.bench import measurement, pytorch, training
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import Figure, Part, Run, ratios, share_of_peak
from hybrid_attn.config import Config
from hybrid_attn.train.schedule import schedule

TARGETS = {2048: 1.5, 8192: 2.5}  # the time of `transformers` over ours, by tokens


def transformers_steps(c: Config, directory: str, decayed: list[str], recompute: bool) -> tuple:
    """The arguments of `pytorch.make_steps` for the steps of `c` with the model that is exported in a directory."""
    training.check_update(c)
    optim = c.optim
    update = {"decayed": decayed, "weight_decay": optim.weight_decay, "betas": [optim.b1, optim.b2], "eps": optim.eps}
    rates = [float(schedule(optim, c.pieces)(step)) for step in range(c.total_steps)]
    tokens_BT = training.batch_of(c)["tokens"].tolist()
    return directory, tokens_BT, update | {"clip_norm": optim.clip_norm}, rates, recompute


def measure(processes: Processes, run: Run) -> list[dict]:
    """Records of both at each length; `transformers` is missing where it cannot be compared with."""
    reason, records = measurement.no_transformers(run.platform, run.dtype), []
    for S in run.lengths:
        c = training.at_length(run.config, S, run.repeats)
        if reason:
            pair = {"ours": training.ours(c), "transformers": (c, reason)}
            records += training.compare(processes, run, "step", pair, records)
        else:
            records += beside_transformers(processes, run, c, records)
    training.check_losses(records)
    return records


def beside_transformers(processes: Processes, run: Run, c: Config, done: list[dict]) -> list[dict]:
    """Records of both at one length; where the activations of `transformers` do not fit, of both again while it recomputes."""
    with tempfile.TemporaryDirectory() as directory:
        args = directory, processes.call("jax", measurement.export, config.to_dict(c), directory, c.stages[0].seq_len)
        remat = c.train.remat != "none"
        task = Task("torch", pytorch.make_steps, transformers_steps(c, *args, remat))
        records = training.compare(processes, run, "step", {"ours": training.ours(c), "transformers": (c, task)}, done)
        if remat or records[1].get("fits", True):
            return records
        task = Task("torch", pytorch.make_steps, transformers_steps(c, *args, True))
        pair = {"ours": training.ours(c), "transformers, recomputing": (c, task)}
        return [records[1], *training.compare(processes, run, "step", pair, done)]


def figures(records: list[dict]) -> dict[str, Figure]:
    """The time of `transformers` over ours, and our share of the matmul peak."""
    made = ratios(records, "seconds", TARGETS)
    for r in records:
        if r["contender"] == "ours" and "seconds" in r:
            share = share_of_peak(r, r["needed_flops"], r["seconds"], training.OF_PEAK.get(r["tokens"]))
            made[f"share of the matmul peak, {r['tokens']:,} tokens"] = share
    return made


PART = Part("A step beside transformers", "configs/bench.py", ("2K", "8K", "32K"), measure, training.table, figures)
