"""From initial values to a chat model in one run: pretraining, extension to four times the length, sft and dpo.

    launch/end_to_end.sh tiny runs/end_to_end     # its data, this run, a merge and a report; 5 minutes on two CPU cores
    python launch/train.py --config=configs/end_to_end.py:tiny --workdir=runs/end_to_end/run      # the run alone

The text is Python's standard library, and so are the conversations and the preferences: tools/write_conversations.py. The
checkpoints of the ends of all stages stay, for the merge and the report. small is the model of configs/hybrid_8k.py.
"""

from hybrid_attn.configs import base

DATA = "runs/end_to_end"  # where launch/end_to_end.sh puts the stores, unless it gets another folder
SIZES = {  # layers, width, feed-forward width, window, tokens of a sequence and of a step, steps of the stages
    "tiny": (4, 64, 192, 64, 512, 4096, (200, 20, 60, 20)),
    "small": (4, 128, 384, 512, 8192, 16_384, (300, 40, 100, 40)),
}


def get_config(size: str = "tiny"):
    if size not in SIZES:
        raise ValueError(f"end_to_end.py has no size {size!r}; it has {', '.join(SIZES)}")
    c = base.get_config()
    m, (m.num_layers, m.d_model, m.d_ff, m.kinds.L.window, length, tokens, steps) = c.model, SIZES[size]
    c.train.remat = "none"
    c.train.checkpoint_every, c.train.keep = 20, sum(steps) // 20 + 1
    c.data.sources = {
        "text": base.source(), "chats": base.source(store=f"{DATA}/chats"), "pairs": base.source(store=f"{DATA}/pairs")
    }  # fmt: skip
    uncut = base.override({"data.packing": "best_fit"})  # conversations and pairs are not cut
    far, rate = 4 * length, c.optim.lr
    c.stages = [
        base.stage(name="pretrain", mixture={"text": 1.0}, lr_schedule=falling(rate)),
        base.stage(name="extend", mixture={"text": 1.0}, lr_schedule=falling(rate / 10)),
        base.stage(name="sft", objective="sft", mixture={"chats": 1.0}, override=uncut, lr_schedule=falling(rate / 4)),
        base.stage(
            name="dpo", objective="dpo", mixture={"pairs": 1.0}, override=uncut, lr_schedule=falling(rate / 100),
            preference=base.preference(beta=0.1),
        ),
    ]  # fmt: skip
    for stage, number, seq_len in zip(c.stages, steps, (length, far, far, far), strict=True):
        stage.steps, stage.seq_len, stage.batch = number, seq_len, max(tokens // seq_len, 1)
    c.evals.names, c.evals.tokens = ("preferences",), 65_536
    return c


def falling(peak: float):
    return base.lr_schedule(start=peak, end=peak / 10, warmup_steps=5)
