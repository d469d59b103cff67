"""Makes a token store from text: python tools/prepare_data.py --input='raw/**/*.jsonl.gz' --tokenizer=bytes --out=STORE

Inputs are text files (one document each), JSON lines (both also as .gz or .zst), Parquet, directories of these or of source
code, and directories that the library datasets saved. --format=chat and --format=preference read conversations and pairs of
completions from JSON lines. After a kill, the same command continues. The store does not depend on --workers. .zst, Parquet and
Arrow files need the extra [data].
"""

import functools
import os

from absl import flags

from hybrid_attn import files, programs
from hybrid_attn.data import chat, conversations, documents, prepare, records, sources
from hybrid_attn.trees import check

INPUT = flags.DEFINE_multi_string("input", None, "Glob pattern or directory; may be repeated.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory of the store.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "bytes, or the path of a tokenizer.json.")
FORMAT = flags.DEFINE_enum(
    "format",
    None,
    (*sources.FORMATS, *conversations.FORMATS),
    "Format of all inputs; by default the suffix of each file decides. chat: JSON lines with messages, or with prompt and "
    "completion. preference: JSON lines with prompt, chosen and rejected.",
)
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of a record that holds the text; a.b is b within a.")
LOSS_FIELD = flags.DEFINE_string(
    "loss_field",
    None,
    'Makes a store with loss masks. The text of a record may be a list of pieces, {"text": ..., "NAME": true or false}, and '
    "this is the NAME of the field that says whether a piece is trained on. A token belongs to the piece in which it begins.",
)
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template",
    None,
    "File with the Jinja template that writes messages as text, for --format=chat and preference; by default the tokenizer's.",
)
TRAIN_ROLES = flags.DEFINE_list(
    "train_roles", ["assistant"], "Roles whose messages are trained on, of --format=chat and preference."
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Limit of tokens of a conversation, or of both halves of a pair together; longer ones count as broken.",
    1,
)
LABEL_FIELD = flags.DEFINE_string("label_field", None, "Field of a record with its label, such as its origin.")
LABEL = flags.DEFINE_string(
    "label", documents.NO_LABEL, "Label of all documents; with --label_field, only of those where that field is null."
)
DROP_DUPLICATES = flags.DEFINE_bool("drop_duplicates", False, "Keep only the first of all documents with the same text.")
ON_ERROR = flags.DEFINE_enum("on_error", "stop", ("stop", "skip"), "What to do with invalid UTF-8 or a broken record.")
SHARD_MB = flags.DEFINE_integer("shard_mb", None, "MB of input in a shard; by default 1/256 of all input, from 1 to 256.", 1)
MAX_DOCUMENT_MB = flags.DEFINE_integer(
    "max_document_mb",
    records.MAX_BYTES // 10**6,
    "Limit in MB of a line, of a text in a table, and of a decompressed text file; longer ones count as broken. Each worker "
    "needs memory for a few documents.",
    1,
    10**6,
)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", 1, 1024)


def read_chat() -> conversations.Chat | None:
    """How conversations are read; ValueError for flags that do not belong together."""
    is_chat = FORMAT.value in conversations.FORMATS
    others = (TEXT_FIELD, LOSS_FIELD) if is_chat else (CHAT_TEMPLATE, TRAIN_ROLES, MAX_TOKENS)
    for flag in others:
        of = "other formats" if is_chat else " and ".join(f"--format={x}" for x in conversations.FORMATS)
        check(not flag.present, f"--{flag.name} belongs to {of}; leave it out, or change --format")
    if not is_chat:
        return None
    roles = tuple(dict.fromkeys(x.strip() for x in TRAIN_ROLES.value))
    check(bool(roles) and all(roles), "--train_roles has no role; name roles of messages, as --train_roles=assistant")
    template = chat.load_template(CHAT_TEMPLATE.value, TOKENIZER.value)
    return conversations.Chat(FORMAT.value, template, roles, MAX_TOKENS.value)


def check_loss_field() -> None:
    blank = LOSS_FIELD.value is not None and not LOSS_FIELD.value.strip()
    of_text = LOSS_FIELD.value in (TEXT_FIELD.value, records.PIECE_TEXT)
    problem = f"--loss_field={LOSS_FIELD.value} {'is empty' if blank else 'holds text'}"
    check(not blank and not of_text, f"{problem}; name the field of a piece that says whether it is trained on")


def prepare_store() -> None:
    files.check_named("out", OUT.value, "the directory of the store")
    check_loss_field()
    of_chat = read_chat()
    options = prepare.Options(
        tokenizer=TOKENIZER.value,
        fields=records.Fields(TEXT_FIELD.value, LABEL_FIELD.value, LOSS_FIELD.value),
        form=FORMAT.value if of_chat is None else "jsonl",
        label=LABEL.value,
        drop_duplicates=DROP_DUPLICATES.value,
        on_error=ON_ERROR.value,
        shard_bytes=None if SHARD_MB.value is None else SHARD_MB.value * 10**6,
        document_bytes=MAX_DOCUMENT_MB.value * 10**6,
        chat=of_chat,
    )
    counts = prepare.prepare(INPUT.value, OUT.value, options, WORKERS.value)
    print(*prepare.summary_lines(counts), sep="\n")


def main(argv):
    programs.run(prepare_store, argv, interrupted="interrupted; the same command continues")


start = functools.partial(programs.start, main, __name__)  # the console script
