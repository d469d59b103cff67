"""An exported model in `transformers` on PyTorch: contenders that need no JAX, so that they can have a process of their own."""

import time

from hybrid_attn.bench import machine
from hybrid_attn.bench.contender import Answer, Ready

ATTENTION = "sdpa"  # PyTorch's scaled dot-product attention


def exported_model(directory: str):
    """An exported model in float32 on PyTorch, with its scaled dot-product attention and the threads that XLA has."""
    import torch
    import transformers

    torch.set_num_threads(machine.threads())
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation=ATTENTION, dtype=torch.float32)


def make_steps(directory: str, tokens_BT: list[list[int]], optim: dict, rates: list[float], recompute: bool) -> Ready:
    """Steps with the update of hybrid_attn/train/optim.py, one for each of the rates.

    `optim` has the `decayed` names of tensors, `weight_decay`, `betas`, `eps` and `clip_norm`.
    """
    import torch

    model = exported_model(directory).train()
    if recompute:
        model.activation_checkpointing_enable()
    has_decay = {True: [], False: []}
    for name, x in model.named_parameters():
        has_decay[name in optim["decayed"]].append(x)
    groups = [{"params": has_decay[True], "weight_decay": optim["weight_decay"]}]
    groups += [{"params": has_decay[False], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=tuple(optim["betas"]), eps=optim["eps"], fused=True)
    tokens, remaining = torch.tensor(tokens_BT), iter(rates)

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def run() -> float:
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_norm"])
        rate = next(remaining)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    loss_of(tokens[:, :16]).backward()  # starts the threads
    adamw.zero_grad()
    return Ready(run, None, model.num_parameters(), ATTENTION)


def make_answers(directory: str, prompt: list[int], new: int) -> Ready:
    """Answers of `new` tokens to a prompt by `generate`, greedily and with its cache."""
    import torch

    model = exported_model(directory).eval()

    def answer(prompt) -> Answer:
        times = [time.perf_counter()]

        def record_time(*_, **__):
            times.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool)

        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None,
            stopping_criteria=[record_time],
        )  # fmt: skip
        tokens = output[0, prompt.shape[1] :].tolist()
        return Answer(times[1] - times[0], (times[-1] - times[1]) / (len(tokens) - 1), tokens, None)

    prompt = torch.tensor([prompt])
    answer(prompt[:, :16])  # starts the threads
    return Ready(lambda: answer(prompt), None, model.num_parameters(), ATTENTION)
