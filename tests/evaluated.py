"""Runs as the suite leaves them, for the tests of the report: records of every evaluation, and answers."""

import json

import numpy as np

from hybrid_attn.evals import report

TRAINED = 4096
LENGTHS = (2048, 4096, 8192)
NASTY = "</pre><script>document.title='broken'</script>\x00\x1b\ud800|"


def answer(task, length, index, score, group="", wanted="7", given="x"):
    return {
        **{"task": task, "length": length, "index": index, "prompt_hash": f"{index:064x}"},
        **{"prompt_end": f"question {index} is", "wanted": [wanted]},
        **{"given": given, "score": score, "group": group, "meta": {"seed": 1}},
    }


def everything(far: float) -> tuple[list[dict], list[dict]]:
    """Records of every evaluation, and answers, of a model that scores `far` beyond its length of training."""
    records, answers = [], []
    for length in LENGTHS:
        share = 1.0 if length <= TRAINED else far
        for task in ("niah_single_1", "vt"):
            scores = [float(i < 8 * share) for i in range(8)]
            record = {"eval": "ruler", "task": task, "length": length, "samples": 8, "nulls": 1}
            records.append(record | {"score": 100 * float(np.mean(scores))})
            answers += [answer(task, length, i, score, given=NASTY if i == 7 else "7") for i, score in enumerate(scores)]
        for depth in (0, 50, 100):
            for needles in (1, 4):
                cell = {"eval": "needle", "length": length, "depth": depth, "needles": needles}
                records.append(cell | {"answers": 8, "right": round(8 * share)})
        recalled = {"eval": "recall", "source": "recall", "task": "recall of 4 pairs", "length": length}
        records.append(recalled | {"answers": 50, "accuracy": share, "by_row": [share] * 12})
        for name in ("all", "recall", "rest"):
            total = {"eval": "position", "source": "a b/c", "length": length, "tokens": 99, "part": name}
            buckets = [{"first": first, "end": end, "loss": 3.0 - share} for first, end in ((0, 16), (16, length))]
            records += [total | x for x in (*buckets, {"loss": 2.5, "bits_per_byte": 3.5})]
        records.append(
            {"eval": "key_tokens", "source": "a b/c", "length": length, "short": length // 2, "key_tokens": 0, "tokens": 99}
            | {"loss": None, "perplexity": None}
        )
        language = {"eval": "languages", "source": "a b/c", "length": length, "tokens": 99, "by_row": [share] * 12}
        records.append(language | {"loss": 2.5, "bits_per_byte": 3.5, "accuracy": share})
        shares = {"L": [0.5, 0.25, 0.25 - share / 8, share / 8], "G": [1 - share / 4, share / 4]}
        for layer, kind in enumerate("LG"):
            routed = {"layer": layer, "kind": kind, "length": length, "tokens": 99, "entropy_bits": 1.5}
            routed |= {"experts": ("feed-forward", "attention")[layer], "load": max(shares[kind]) * len(shares[kind])}
            records.append({"eval": "routing", "source": "a b/c", "shares": shares[kind]} | routed)
        pairs = {"eval": "preferences", "source": "a b/c", "length": length, "pairs": 7, "tokens": 99, "accuracy": share}
        pairs |= {"chosen": -9.0, "rejected": -9.5, "margin": 0.5, "mass": 0.9}
        records.append(pairs | {"entropy_bits": 2.0, "renormalised_entropy_bits": 2.1})
        judged = {"eval": "win_rate", "source": "a b/c", "length": length, "prompts": 12}
        judged |= {"prompts_hash": "a" * 64, "judge": "b" * 64}
        judged |= {"log_prob": -2.0 - share, "tokens": 3.0, "distinct": [0.5] * 4 + [None], "ead": [0.6] * 4 + [None]}
        judged |= {"answers": [NASTY] * 12, "prompt_ends": [NASTY] * 12}
        records.append(judged | {"log_probs": [-2.0 - share - i / 100 for i in range(12)]})
    for layer, kind in enumerate("LG"):
        for head in range(3):
            weights = {"edges": [10, 20, 40], "weights": [0.01, 0.002 * layer]}
            shares = {"begin": 0.25, "needle": 0.25 * layer, "context": 0.5 - 0.25 * layer, "qc": 0.25, "sink_rate": 0.2}
            sizes = {"begin": 10, "needle": 20, "context": 4050, "qc": 16}
            shares |= {f"{name}_per_token": shares[name] / size for name, size in sizes.items()}
            more = {"entropy_bits": 5.0, "needle_lift": 9.0 if layer else None, "retrieval": 0.4 if layer else None}
            where = {
                "source": "probe",
                "prompts": 2,
                "layer": layer,
                "kind": kind,
                "head": head,
                "length": 4096,
                "reach": kind == "G",
            }
            records.append({"eval": "attention_mass"} | where | shares | more | weights)
    scored = {"task": "copy", "length": 2048, "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "documents": 20}
    counts = {"shots": 0, "version": "Yaml", "requests": 20, "truncated": 3, "windowed": 2}
    return [*records, {"eval": "harness"} | scored | counts], answers


def store(directory, records, answers, **provenance):
    directory.mkdir(parents=True)
    model = {"seq_len": TRAINED, "layers": "LG", "parameters": 1234567}
    (directory / "run.json").write_text(json.dumps({"revision": "abc123", "step": 300, "model": model} | provenance))
    for name, lines in (("records", records), ("answers", answers)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return report.read(directory)


def run_of(name, answers, records=()):
    return report.Run(name, tuple(records), tuple(answers), {"model": {"seq_len": TRAINED}})


def two(folder):
    """Of every evaluation, and of some."""
    records, answers = everything(0.25)
    some = [record for record in records if record["eval"] != "attention_mass" and record.get("needles") != 4]
    return [store(folder / "hybrid <3:1>", *everything(0.75)), store(folder / "rope", some, answers)]
