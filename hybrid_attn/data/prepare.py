"""Files of text to a token store: in parallel, in an order that no number of workers changes, and over many sittings.

The input files, in order, are cut into groups, once; each group becomes one shard, by one worker. Until all are done a store
has no manifest, and lies so:

    plan.json                     what is to be done: options, tokenizer, and the files of each shard
    parts/shard-00000.tokens      all documents of the group
    parts/shard-00000.npz         length, hash, label, bytes of each
    parts/shard-00000.json        what was skipped; written last, so a part that has it is whole

Then duplicates are known, and each shard is linked or copied from its part without them.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import tqdm

from hybrid_attn import characters, files
from hybrid_attn.data import documents, parts, sources, store, summary
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields
from hybrid_attn.data.tokenizer import load_tokenizer

PLAN, PARTS = store.PLAN, parts.FOLDER
ENCODED = 2**20  # bytes of text that a tokenizer is given at a time
COPIED = 2**22  # tokens that are in memory while a shard is copied
MOST_LABELS = 2**16
SHARDS = 256  # enough for all cores and for little to do again, by default; each of at least and at most:
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 10**6, 256 * 10**6
REPORTED = 20  # broken places that are named


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides the content of a store, beside its files.

    `form` None goes by each file's ending; `label` is that of all documents unless `fields` has one; `on_error` is "skip"
    or "stop"; at most `shard_bytes` of input go into a shard, but for files that cannot be split; None goes by the whole. A
    line, a text in a table and a decompressed file of text have at most `document_bytes`.
    """

    tokenizer: str
    fields: Fields
    form: str | None
    label: str
    drop_duplicates: bool
    on_error: str
    shard_bytes: int | None
    document_bytes: int = MAX_BYTES


def prepare(inputs: Sequence[str], out: str, options: Options, workers: int, say: Callable[[str], None] = print) -> dict:
    """Writes the store `out` from the files that `inputs` name, and returns its summary.

    The same call goes on where a killed one stopped. ValueError for a wrong input, OSError for a disk that fails, for
    instance because it is full, BlockingIOError where another process writes the store, ImportError for a missing library.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    plan = _plan(inputs, options, tokenizer)
    folder = Path(out)
    _check_ours(folder)
    if (folder / store.MANIFEST).exists() and not (folder / PARTS).exists():
        return _complete(folder, plan, say)  # which may be read-only
    with files.lock(folder):
        try:
            begun = _begin(folder, plan)
            done = _run(folder, plan, options, tokenizer, workers, say) if begun else _complete(folder, plan, say)
        except BrokenProcessPool as error:
            raise OSError(f"a worker was killed, perhaps for want of memory; {_progress(folder, plan)}") from error
        except OSError as error:
            raise type(error)(f"{error}; {_progress(folder, plan)}") from error
        (folder / files.LOCK).unlink()  # nobody writes a complete store
    return done


def _complete(folder: Path, plan: dict, say: Callable[[str], None]) -> dict:
    _check_same(folder, plan, complete=True)
    if (folder / PARTS).exists():
        shutil.rmtree(folder / PARTS)
    say(f"{folder} is complete")
    return store.read_manifest(str(folder)).summary


def _plan(inputs: Sequence[str], options: Options, tokenizer) -> dict:
    """Options, files, and the pieces (file, first byte, last) of each shard, as JSON."""
    found = []
    for path in sources.find(inputs):
        state = os.stat(path)
        found.append({"path": path, "bytes": state.st_size, "modified_ns": state.st_mtime_ns})
    total = sum(file["bytes"] for file in found)
    most = options.shard_bytes or min(max(total // SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    shards, size = [[]], 0
    for i, file in enumerate(found):
        form = options.form or sources.format_of(file["path"])
        cuts = -(-file["bytes"] // most) if sources.splits(file["path"], form) else 1
        edges = [file["bytes"] * k // cuts for k in range(cuts + 1)] if cuts else [0, 0]
        for start, stop in itertools.pairwise(edges):
            if shards[-1] and size + stop - start > most:
                shards.append([])
                size = 0
            shards[-1].append([i, start, stop])
            size += stop - start
    return {"options": dataclasses.asdict(options), "tokenizer_hash": tokenizer.hash, "files": found, "shards": shards}


def _check_ours(folder: Path) -> None:
    """ValueError where `folder` holds something else than a store."""
    ours = (folder / PLAN).exists() or not folder.exists()
    if not ours and any(path.name != files.LOCK and not path.name.startswith(f"{PLAN}.partial") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no unfinished store; name another --out")


def _begin(folder: Path, plan: dict) -> bool:
    """Whether there is work left; ValueError where `folder` holds other work."""
    if (folder / store.MANIFEST).exists():
        return False
    if (folder / PLAN).exists():
        _check_same(folder, plan, complete=False)
    _write(folder / PLAN, [json.dumps(plan, indent=1).encode()])
    (folder / PARTS).mkdir(exist_ok=True)
    return True


def _check_same(folder: Path, new: dict, complete: bool) -> None:
    """ValueError where `folder` was begun with another plan, or its plan cannot be read."""
    try:
        old = json.loads((folder / PLAN).read_text())
        # What is done without an error is the same either way, and stores of an older version had no bound.
        free = {"on_error"} if not complete and new["options"]["on_error"] == "skip" else set()
        free |= {"document_bytes"} if old["options"]["on_error"] == "stop" else set()
        older = {"document_bytes": new["options"]["document_bytes"]}
        _compare(folder, old | {"options": older | old["options"]}, new, free)
    except (AttributeError, KeyError, RecursionError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / PLAN} is not as it was written: {error!r}; name another --out") from error


def _compare(folder: Path, old: dict, new: dict, free: set[str]) -> None:
    """ValueError where two plans differ, but for the `free` options."""
    cure = "give what it was begun with, or name another --out"
    for name, value in new["options"].items():
        if old["options"][name] != value and name not in free:
            raise ValueError(f"{folder} was begun with {name}={old['options'][name]!r}, and this is {value!r}; {cure}")
    if old["tokenizer_hash"] != new["tokenizer_hash"]:
        raise ValueError(f"the tokenizer {new['options']['tokenizer']!r} was changed since {folder} was begun; {cure}")
    before, now = ({file["path"]: file for file in plan["files"]} for plan in (old, new))
    changed = sorted(path for path in {**before, **now} if before.get(path) != now.get(path))
    if changed or old["shards"] != new["shards"]:
        what = changed[0] if changed else "in their order"
        raise ValueError(f"the input files changed since {folder} was begun ({len(changed)} of them, first {what}); {cure}")


def _run(folder: Path, plan: dict, options: Options, tokenizer, workers: int, say: Callable[[str], None]) -> dict:
    shards = [[(plan["files"][i]["path"], start, stop) for i, start, stop in shard] for shard in plan["shards"]]
    sizes = [sum(stop - start for _, start, stop in shard) for shard in shards]
    for left_over in folder.glob("**/*.partial*"):
        left_over.unlink()
    todo = [i for i in range(len(shards)) if not parts.path(folder, i, "json").exists()]
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo)} of {len(shards)} shards are done already")
    before = sum(sizes) - sum(sizes[i] for i in todo)
    with tqdm.tqdm(total=sum(sizes), initial=before, unit="B", unit_scale=True, desc="input") as bar:
        for i in _in_processes(_encode_shard, {i: (folder, i, shards[i], options) for i in todo}, workers):
            bar.update(sizes[i])
    dtype = documents.token_dtype(tokenizer.vocab_size)
    done = [parts.read(folder, i, dtype.itemsize) for i in range(len(shards))]
    places = [place for part in done for place in part["places"]]
    for place in places[:REPORTED]:
        say(characters.line(f"skipped      {place}"))
    names = sorted({name for part in done for name in part["labels"]})
    if not names:
        skipped = {what: count for what, count in summary.skipped(done).items() if count}
        raise ValueError(
            f"the {len(plan['files'])} input files have no text; skipped: {skipped}; name another --text_field, "
            f"--format or --input, and another --out or delete {folder}"
        )
    if len(names) > MOST_LABELS:
        raise ValueError(f"the label field has {len(names):,} values and a store holds {MOST_LABELS:,}; name a coarser one")
    keep = _first_copies(folder, len(shards)) if options.drop_duplicates else [None] * len(shards)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        written = list(pool.map(lambda i: _write_shard(folder, i, done[i], keep[i], names, dtype), range(len(shards))))
    found = summary.summary([counts for _, counts in written], done, names)
    manifest = store.Manifest(
        store.FORMAT, options.tokenizer, tokenizer.hash, dtype.str, tuple(names), tuple(shard for shard, _ in written), found
    )
    _write(folder / store.MANIFEST, [manifest.to_json().encode()])
    shutil.rmtree(folder / PARTS)
    return found


def _in_processes(function: Callable, calls: dict[int, tuple], workers: int) -> Iterator[int]:
    """Calls `function` with each tuple of arguments, in this process for one worker; yields the keys of those done."""
    if workers == 1:
        for i, arguments in calls.items():
            function(*arguments)
            yield i
        return
    context = multiprocessing.get_context("spawn")  # threads of the tokenizers' library do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as pool:
        # A worker that is starting would report Ctrl-C with tracebacks of its imports: it is blocked until it can end.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        pending = {pool.submit(function, *arguments): i for i, arguments in calls.items()}
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for future in concurrent.futures.as_completed(pending):
                future.result()
                yield pending[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """A worker uses one core, ends in silence on Ctrl-C, and does not outlive the process that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_tokenizer = functools.cache(load_tokenizer)


def _encode_shard(folder: Path, index: int, pieces: list[tuple[str, int, int]], options: Options) -> None:
    """Writes the part `index` of all documents in `pieces`."""
    tokenizer = _tokenizer(options.tokenizer)
    dtype = documents.token_dtype(tokenizer.vocab_size)
    columns, labels = {name: [] for name in parts.COLUMNS}, {}
    skipped, places = collections.Counter(), []

    def texts() -> Iterator[bytes]:
        for path, start, stop in pieces:
            for found in sources.read(path, options.form, options.fields, start, stop, options.document_bytes):
                if isinstance(found, Broken):
                    reason = f"{found.reason}, which --max_document_mb raises" if found.too_long else found.reason
                    if options.on_error == "stop":
                        raise ValueError(f"{reason}; go on with --on_error=skip, or mend it and begin with another --out")
                    skipped["broken"] += 1
                    places.append(reason)
                elif isinstance(found, Binary):
                    skipped["binary"] += 1
                    places.append(found.reason)
                elif not found.text:
                    skipped["empty"] += 1
                else:
                    columns["hashes"].append(documents.content_hash(found.text))
                    columns["labels"].append(labels.setdefault(found.label or options.label, len(labels)))
                    columns["bytes"].append(len(found.text))
                    yield found.text

    def blocks() -> Iterator[bytes]:
        for batch in _batches(texts()):
            encoded = tokenizer.encode_batch(batch)
            lengths = [len(ids) + 2 for ids in encoded]
            columns["lengths"] += lengths
            tokens = np.empty(sum(lengths), dtype)
            at = 0
            for ids, length in zip(encoded, lengths, strict=True):
                tokens[at], tokens[at + 1 : at + length - 1], tokens[at + length - 1] = tokenizer.bos, ids, tokenizer.eos
                at += length
            yield tokens.data

    digest = _write(parts.path(folder, index, "tokens"), blocks())
    packed = io.BytesIO()
    np.savez(packed, **{name: np.array(values, parts.COLUMNS[name]) for name, values in columns.items()})
    _write(parts.path(folder, index, "npz"), [packed.getbuffer()])
    part = {"sha256": digest, "labels": list(labels), "skipped": skipped, "places": places[:REPORTED]}
    _write(parts.path(folder, index, "json"), [json.dumps(part).encode()])


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Consecutive texts, about `ENCODED` bytes at a time."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODED:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_copies(folder: Path, shards: int) -> list[np.ndarray]:
    """Which documents of each part are the first with their hash."""
    hashes = [parts.columns(folder, i)["hashes"] for i in range(shards)]
    keep = np.zeros(sum(map(len, hashes)), bool)
    keep[np.unique(np.concatenate(hashes), return_index=True)[1]] = True
    return np.split(keep, np.cumsum([len(x) for x in hashes])[:-1])


def _write_shard(
    folder: Path, index: int, part: dict, kept: np.ndarray | None, names: list[str], dtype: np.dtype
) -> tuple[store.Shard, dict]:
    """The shard of a part's `kept` documents, None for all, and what there is of each of the labels `names`."""
    x = parts.columns(folder, index)
    place = {name: i for i, name in enumerate(names)}
    x["labels"] = np.array([place[name] for name in part["labels"]], np.int64)[x["labels"]]
    tokens_path, tokens_sha256 = folder / store.tokens_name(index), part["sha256"]
    if kept is None or kept.all():
        tokens_path.unlink(missing_ok=True)
        try:
            os.link(parts.path(folder, index, "tokens"), tokens_path)
        except OSError:  # a file system without links
            shutil.copyfile(parts.path(folder, index, "tokens"), tokens_path)
    else:
        tokens_sha256 = _write(tokens_path, _kept_tokens(parts.path(folder, index, "tokens"), dtype, x["lengths"], kept))
        x = {name: values[kept] for name, values in x.items()}
    index_sha256 = _write(folder / store.index_name(index), [store.index_bytes(x["lengths"], x["hashes"], x["labels"])])
    by_label = {
        "documents": np.bincount(x["labels"], minlength=len(names)),
        **{
            what: np.bincount(x["labels"], x[column], len(names)).astype(np.int64)
            for what, column in (("tokens", "lengths"), ("bytes", "bytes"))
        },
    }
    counts = {
        "duplicates": 0 if kept is None else int(np.sum(~kept)),
        "lengths": np.bincount(np.frexp(x["lengths"])[1], minlength=64),
        "labels": by_label,
    }
    return store.Shard(len(x["lengths"]), int(x["lengths"].sum()), tokens_sha256, index_sha256), counts


def _kept_tokens(path: Path, dtype: np.dtype, lengths: np.ndarray, kept: np.ndarray) -> Iterator[memoryview]:
    tokens, ends = np.memmap(path, dtype, "r"), np.concatenate([[0], np.cumsum(lengths)])
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        for at in range(ends[first], ends[last], COPIED):
            yield tokens[at : min(at + COPIED, ends[last])].data


def _progress(folder: Path, plan: dict) -> str:
    done = len(list((folder / PARTS).glob("*.json")))
    return f"{done} of {len(plan['shards'])} shards are done and kept; once that is mended, the same command goes on"


def _write(path: Path, blocks: Iterable) -> str:
    """Writes a file that is whole or not there; returns its SHA-256."""
    partial, digest = path.with_name(f"{path.name}.partial{os.getpid()}"), hashlib.sha256()
    try:
        with open(partial, "wb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digest.hexdigest()
