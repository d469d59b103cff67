"""Training steps here and in `transformers`: the same model (ours, exported), tokens, loss and AdamW.

It runs on PyTorch with its scaled dot-product attention, on a CPU, with the extra `oracle`. It gives windowed layers a mask and
computes all S x S scores, which the column of FLOPs counts. Where its activations do not fit into --memory_gib, it recomputes
those of each layer.
"""

import tempfile

from hybrid_attn import config
from hybrid_attn.bench import measurement, training
from hybrid_attn.bench.measurement import Processes, Ready, Task
from hybrid_attn.bench.part import Figure, Part, Run, ratios, share_of_peak
from hybrid_attn.config import Config
from hybrid_attn.train.schedule import schedule

TARGETS = {2048: 1.5, 8192: 2.5}  # the time of `transformers` over ours, by tokens


def make_transformers(values: dict, directory: str, decayed_names: list[str], remat: str) -> Ready:
    """Steps of the exported model in `transformers`, with the update of hybrid_attn/train/optim.py."""
    import torch

    c, model = config.build(values), measurement.exported_model(directory).train()
    optim = c.optim
    if remat != "none":
        model.activation_checkpointing_enable()
    groups = [
        {"params": [x for name, x in model.named_parameters() if name in decayed_names], "weight_decay": optim.weight_decay},
        {"params": [x for name, x in model.named_parameters() if name not in decayed_names], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.b1, optim.b2), eps=optim.eps, fused=True)
    rates = iter([float(schedule(optim, c.pieces)(step)) for step in range(c.total_steps)])
    tokens = torch.from_numpy(training.batch_of(c)["tokens"]).long()

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def run() -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        rate = next(rates)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    loss_of(tokens[:, :16]).backward()  # starts the threads
    adamw.zero_grad()
    return Ready(run, None)


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
    values, remat = config.to_dict(c), run.config.train.remat
    with tempfile.TemporaryDirectory() as directory:
        args = values, directory, processes.call("jax", measurement.export, values, directory, c.stages[0].seq_len)
        task = Task("torch", make_transformers, (*args, remat))
        records = training.compare(processes, run, "step", {"ours": training.ours(c), "transformers": (c, task)}, done)
        if remat != "none" or records[1].get("fits", True):
            return records
        task = Task("torch", make_transformers, (*args, "layer"))
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
