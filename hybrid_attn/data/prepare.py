"""Turns text files into a token store, in parallel. A killed run resumes, and the number of workers does not change the store.

The input files are divided into groups once, in order, and one worker makes a shard of each group. A store that is not finished
has no manifest, and these files:

    plan.json                     options, tokenizer, and the files of each shard
    parts/shard-00000.tokens      the tokens of all documents of a group
    parts/shard-00000.loss_mask   their loss masks, if the records may have pieces (`Fields.loss`) or are conversations
    parts/shard-00000.npz         length, hash, label and bytes of each document
    parts/shard-00000.json        labels, checksum and skipped documents; written last, so a part with this file is complete

When all parts are complete, duplicates are known. Each shard is then linked or copied from its part, without the duplicates.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tqdm

from hybrid_attn import characters, files
from hybrid_attn.data import documents, parts, sources, store
from hybrid_attn.data.parts import Options
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.trees import check

COPIED = 2**22  # tokens in memory while a shard is copied
MAX_LABELS = 2**16
SHARDS = 256  # by default: enough to use all cores, and a killed run loses little
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 10**6, 256 * 10**6


def prepare(inputs: Sequence[str], out: str, options: Options, workers: int, say: Callable[[str], None] = print) -> dict:
    """Writes the store `out` from the files of `inputs` and returns its summary; the same call resumes a killed one.

    ValueError for wrong input, OSError for a disk that fails or is full, BlockingIOError if another process writes the store.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    plan = _plan(inputs, options, tokenizer)
    folder = Path(out)
    names = [path.name.lstrip(".") for path in folder.iterdir()] if folder.exists() else []
    others = [x for x in names if f".{x}" != files.LOCK and not x.startswith(f"{store.PLAN}.partial")]
    of_store = not others or store.PLAN in names
    check(of_store, f"{folder} is not empty and has no unfinished store; name another --out")
    if (folder / store.MANIFEST).exists() and not (folder / parts.FOLDER).exists():
        return _complete(folder, plan, say)  # takes no lock: the folder may be read-only
    with files.lock(folder):
        try:
            if (folder / store.MANIFEST).exists():
                counts = _complete(folder, plan, say)
            else:
                counts = _make(folder, plan, options, tokenizer, workers, say)
        except concurrent.futures.BrokenExecutor as error:
            raise OSError(f"a worker was killed, perhaps because memory ran out; {_progress(folder, plan)}") from error
        except OSError as error:
            raise type(error)(f"{error}; {_progress(folder, plan)}") from error
        (folder / files.LOCK).unlink()  # a complete store is never written again
    return counts


def _complete(folder: Path, plan: dict, say: Callable[[str], None]) -> dict:
    _check_same(folder, plan, complete=True)
    if (folder / parts.FOLDER).exists():
        shutil.rmtree(folder / parts.FOLDER)
    say(f"{folder} is complete")
    return store.read_manifest(str(folder)).summary


def _plan(inputs: Sequence[str], options: Options, tokenizer) -> dict:
    """Options, files, and the pieces (file, start byte, stop byte) of each shard, as JSON."""
    described = []
    for path in sources.find(inputs):
        state = os.stat(path)
        described.append({"path": path, "bytes": state.st_size, "modified_ns": state.st_mtime_ns})
    total = sum(file["bytes"] for file in described)
    limit = options.shard_bytes or min(max(total // SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    shards, size = [[]], 0
    for i, file in enumerate(described):
        form = options.form or sources.format_of(file["path"])
        cuts = -(-file["bytes"] // limit) if sources.splits(file["path"], form) else 1
        edges = [file["bytes"] * k // cuts for k in range(cuts + 1)] if cuts else [0, 0]
        for start, stop in itertools.pairwise(edges):
            if shards[-1] and size + stop - start > limit:
                shards.append([])
                size = 0
            shards[-1].append([i, start, stop])
            size += stop - start
    values = dataclasses.asdict(options)
    if options.fields.loss is None:  # plans of older versions, without loss masks, compare equal
        del values["fields"]["loss"]
    if options.chat is not None:
        template = options.chat.template
        digest = None if template is None else hashlib.sha256(template.encode()).hexdigest()
        values["chat"] |= {"template": digest, "train_roles": list(options.chat.train_roles)}
    return {"options": values, "tokenizer_hash": tokenizer.hash, "files": described, "shards": shards}


def _check_same(folder: Path, new: dict, complete: bool) -> None:
    """ValueError if `folder` was begun with another plan, or its plan cannot be read."""
    cure = "; name another --out"
    old = files.read_object(folder / store.PLAN, cure)
    try:
        # Parts made without an error do not depend on on_error. Older versions had no limit of document_bytes and no chat.
        ignored = {"on_error"} if not complete and new["options"]["on_error"] == "skip" else set()
        ignored |= {"document_bytes"} if old["options"]["on_error"] == "stop" else set()
        default = {"document_bytes": new["options"]["document_bytes"], "chat": None}
        _compare(folder, old | {"options": default | old["options"]}, new, ignored)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / store.PLAN} is damaged: {error!r}{cure}") from error


def _compare(folder: Path, old: dict, new: dict, ignored: set[str]) -> None:
    """ValueError where two plans differ, apart from the `ignored` options."""
    cure = "use what it was begun with, or name another --out"
    for name, value in new["options"].items():
        before = old["options"][name]
        same = before == value or name in ignored
        check(same, f"{folder} was begun with {name}={before!r}, and now it is {value!r}; {cure}")
    same = old["tokenizer_hash"] == new["tokenizer_hash"]
    check(same, f"the tokenizer {new['options']['tokenizer']!r} has changed since {folder} was begun; {cure}")
    before, now = ({file["path"]: file for file in plan["files"]} for plan in (old, new))
    changed = sorted(path for path in {**before, **now} if before.get(path) != now.get(path))
    first = changed[0] if changed else "in their order"
    same = not changed and old["shards"] == new["shards"]
    check(same, f"the input files changed since {folder} was begun ({len(changed)} of them, first {first}); {cure}")


def _make(folder: Path, plan: dict, options: Options, tokenizer, workers: int, say: Callable[[str], None]) -> dict:
    """Makes the parts that are missing, and then the store; returns its summary."""
    _make_parts(folder, plan, options, workers, say)
    dtype = documents.token_dtype(tokenizer.vocab_size)
    made = [parts.read(folder, i, dtype.itemsize, options.has_mask) for i in range(len(plan["shards"]))]
    reasons = [reason for part in made for reason in part["places"]]
    for reason in reasons[: parts.REPORTED]:
        say(characters.line(f"skipped      {reason}"))
    names = sorted({name for part in made for name in part["labels"]})
    skipped = {reason: count for reason, count in _skipped(made).items() if count}
    cure = f"name another --text_field, --format or --input, and another --out or delete {folder}"
    check(bool(names), f"the {len(plan['files'])} input files have no text; skipped: {skipped}; {cure}")
    too_many = f"the label field has {len(names):,} values, and a store has at most {MAX_LABELS:,}; name a coarser one"
    check(len(names) <= MAX_LABELS, too_many)
    halves = 2 if options.pairs else 1
    keep = _first_copies(folder, len(made), halves) if options.drop_duplicates else [None] * len(made)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        written = list(pool.map(lambda i: _write_shard(folder, i, made[i], keep[i], names, dtype), range(len(made))))
    counts = _summary([counts for _, counts in written], made, names)
    nothing_trained = f"no piece has {options.fields.loss!r}: true, so nothing would be trained on; name another --loss_field"
    check(counts.get("trained_tokens") != 0, f"{nothing_trained}, and another --out or delete {folder}")
    shards = tuple(shard for shard, _ in written)
    of_tokenizer = (store.FORMAT, options.tokenizer, tokenizer.hash, dtype.str)
    template = None if options.chat is None else options.chat.template
    manifest = store.Manifest(*of_tokenizer, tuple(names), shards, counts, template, options.pairs)
    parts.write(folder / store.MANIFEST, [manifest.to_json().encode()])
    shutil.rmtree(folder / parts.FOLDER)
    return counts


def _make_parts(folder: Path, plan: dict, options: Options, workers: int, say: Callable[[str], None]) -> None:
    """Writes the plan and makes the parts that are missing, in parallel; ValueError if `folder` has another plan."""
    if (folder / store.PLAN).exists():
        _check_same(folder, plan, complete=False)
    parts.write(folder / store.PLAN, [json.dumps(plan, indent=1).encode()])
    (folder / parts.FOLDER).mkdir(exist_ok=True)
    shards = [[(plan["files"][i]["path"], start, stop) for i, start, stop in shard] for shard in plan["shards"]]
    sizes = [sum(stop - start for _, start, stop in shard) for shard in shards]
    for left_over in folder.glob("**/*.partial*"):
        left_over.unlink()
    todo = [i for i in range(len(shards)) if not parts.path(folder, i, "json").exists()]
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
    before = sum(sizes) - sum(sizes[i] for i in todo)
    with tqdm.tqdm(total=sum(sizes), initial=before, unit="B", unit_scale=True, desc="input") as bar:
        for i in _in_processes(parts.encode, {i: (folder, i, shards[i], options) for i in todo}, workers):
            bar.update(sizes[i])


def _in_processes(function: Callable, calls: dict[int, tuple], workers: int) -> Iterator[int]:
    """Calls `function` with each tuple of arguments, in this process for one worker; yields the keys of finished calls."""
    if workers == 1:
        for i, arguments in calls.items():
            function(*arguments)
            yield i
        return
    context = multiprocessing.get_context("spawn")  # the threads of the library tokenizers do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        # Ctrl-C during the imports of a new worker would print tracebacks, so workers start with the signal blocked.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pending = {pool.submit(function, *arguments): i for i, arguments in calls.items()}
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in concurrent.futures.as_completed(pending):
                future.result()
                yield pending[future]
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Makes a worker use one core, end silently on Ctrl-C, and end with the process that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _first_copies(folder: Path, shards: int, halves: int) -> list[np.ndarray]:
    """For each part, bool [n]: whether a document is the first with its hash; with two `halves`, whether its pair is."""
    hashes = [parts.columns(folder, i)["hashes"][::halves] for i in range(shards)]
    keep = np.zeros(sum(map(len, hashes)), bool)
    keep[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
    return [np.repeat(x, halves) for x in np.split(keep, np.cumsum([len(x) for x in hashes])[:-1])]


def _write_shard(
    folder: Path, number: int, part: dict, selected: np.ndarray | None, names: list[str], dtype: np.dtype
) -> tuple[store.Shard, dict]:
    """Writes the shard of the `selected` documents of a part (None: all). Returns it and its counts, for `_summary`."""
    x = parts.columns(folder, number)
    label_numbers = {name: i for i, name in enumerate(names)}
    x["labels"] = np.array([label_numbers[name] for name in part["labels"]], np.int64)[x["labels"]]
    copied, duplicates = None, 0
    if selected is not None and not selected.all():
        copied, duplicates = _ranges(x["lengths"], selected), int(np.sum(~selected))
    tokens_sha256 = _copied(folder, parts.path(folder, number, "tokens"), part["sha256"], dtype, copied)
    mask_sha256, mask_path = part.get("loss_mask_sha256"), parts.path(folder, number, "loss_mask")
    if mask_sha256 is not None:
        mask_sha256 = _copied(folder, mask_path, mask_sha256, store.LOSS_MASK.dtype, copied)
    if copied is not None:
        x = {name: values[selected] for name, values in x.items()}
    index = store.index_bytes(x["lengths"], x["hashes"], x["labels"])
    index_sha256 = parts.write(folder / store.file_name(number, "index"), [index])
    counts = _counts(x, len(names)) | {"duplicates": duplicates}
    if mask_sha256 is not None:
        with open(folder / mask_path.name, "rb") as file:
            counts["trained_tokens"] = sum(block.count(1) for block in iter(lambda: file.read(store.BLOCK), b""))
    return store.Shard(len(x["lengths"]), int(x["lengths"].sum()), tokens_sha256, index_sha256, mask_sha256), counts


def _ranges(lengths: np.ndarray, selected: np.ndarray) -> list[tuple[int, int]]:
    """The tokens [start, stop) of the `selected` bool [n] documents of a part, at most `COPIED` at a time."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], selected, [False]]).astype(np.int8)))
    runs = ends[edges].reshape(-1, 2).tolist()
    return [(start, min(start + COPIED, last)) for first, last in runs for start in range(first, last, COPIED)]


def _copied(folder: Path, source: Path, sha256: str, dtype: np.dtype, ranges: list[tuple[int, int]] | None) -> str:
    """Links or copies the file `source` of a part to `folder`, or writes the `ranges` of it there; returns its SHA-256."""
    path = folder / source.name
    if ranges is not None:
        values = np.memmap(source, dtype, "r")
        return parts.write(path, (values[start:stop].data for start, stop in ranges))
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:  # a file system without links
        shutil.copyfile(source, path)
    return sha256


def _progress(folder: Path, plan: dict) -> str:
    done = len(list((folder / parts.FOLDER).glob("*.json")))
    return f"{done} of {len(plan['shards'])} shards are done and kept; solve the problem, then the same command continues"


def _counts(columns: dict[str, np.ndarray], labels: int) -> dict[str, np.ndarray]:
    """Documents, tokens and bytes by label, and documents by length, of a shard with these `parts.COLUMNS`."""
    weights = {"documents": None, "tokens": columns["lengths"], "bytes": columns["bytes"]}
    by_label = {what: np.bincount(columns["labels"], weight, labels).astype(np.int64) for what, weight in weights.items()}
    # A length of [2^(k - 1), 2^k) has the exponent k.
    return by_label | {"lengths": np.bincount(np.frexp(columns["lengths"])[1], minlength=64)}


def _summary(shards: list[dict], made: list[dict], names: list[str]) -> dict:
    """The summary of a store, from the `_counts` of its shards, the parts `made`, and the `names` of its labels."""
    total = {what: sum(shard[what] for shard in shards) for what in shards[0]}
    by_label = {what: total[what] for what in ("documents", "tokens", "bytes")}
    trained = {"trained_tokens": total["trained_tokens"]} if "trained_tokens" in total else {}
    return {
        **{what: int(values.sum()) for what, values in by_label.items()},
        **trained,
        "skipped": _skipped(made) | {"duplicates": total["duplicates"]},
        "lengths": {str(2 ** (k - 1)): int(count) for k, count in enumerate(total["lengths"]) if count},
        "labels": {name: {what: int(values[i]) for what, values in by_label.items()} for i, name in enumerate(names)},
    }


def _skipped(made: list[dict]) -> dict[str, int]:
    return {what: sum(part["skipped"].get(what, 0) for part in made) for what in ("broken", "empty", "binary")}


def summary_lines(summary: dict) -> list[str]:
    """The lines of a summary, for printing; ValueError if it is damaged."""
    try:
        return [characters.line(line) for line in _lines(summary)]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the summary in the manifest is damaged: {error!r}; prepare the store again") from error


def _lines(summary: dict) -> Iterator[str]:
    yield f"documents    {summary['documents']:,}, of {summary['bytes']:,} bytes"
    yield f"tokens       {summary['tokens']:,}, {_ratio(summary):.3f} bytes each, BOS and EOS included"
    if "trained_tokens" in summary:
        trained = summary["trained_tokens"]
        yield f"loss mask    {trained:,} tokens are trained on ({trained / summary['tokens']:.1%})"
    yield f"skipped      {', '.join(f'{count:,} {what}' for what, count in summary['skipped'].items())}"
    for label, values in summary["labels"].items():
        share = values["tokens"] / summary["tokens"]
        yield (
            f"label        {label}: {values['documents']:,} documents, {values['tokens']:,} tokens ({share:.1%}), "
            f"{_ratio(values):.3f} bytes each"
        )
    most = max(summary["lengths"].values())
    for first, count in summary["lengths"].items():
        bar = "#" * min(40, -(-40 * count // most))
        yield f"length       {f'{int(first):,} to {2 * int(first) - 1:,}':>27}  {count:>11,}  {bar}"


def _ratio(values: dict) -> float:
    return values["bytes"] / max(1, values["tokens"])  # 0 tokens if all documents of a label were copies of others
