"""Records of conversations become documents: a chat template writes their text, and the turns of some roles are trained on."""

import json
import pickle

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import BLOCKED, assert_close, random_params, tiny, tool
from prepared import BYTES, content, run

from hybrid_attn.data import chat, documents, store
from hybrid_attn.data.conversations import Chat, Reader
from hybrid_attn.data.packed import PackedSequences
from hybrid_attn.data.records import Fields
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.model import losses
from hybrid_attn.programs import parse

FIELDS = Fields("text", None)
PLAIN = chat.load_template(None, "bytes")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (  # a system message is a part of the user's first one; BOS and EOS are written by the template
    "{% if messages[0].role == 'system' %}{% set system, rest = messages[0].content ~ '\n', messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token if loop.first }}"
    "[INST] {{ system if loop.first }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('unknown role ' ~ m.role) }}"
    "{% endif %}{% endfor %}"
)


def says(role, content, **others):
    return {"role": role, "content": content, **others}


TALK = [
    says("system", "be kind"),
    says("user", "hi é"),
    says("assistant", "yo 東"),
    says("user", "bye"),
    says("assistant", "ok"),
]


def read(record, template=PLAIN, roles=("assistant",), tokenizer=BYTES, **form):
    """The one document of a record."""
    (document,) = Reader(Chat("chat", template, roles, **form), None, tokenizer).document(record).documents
    return document


def trained(document, tokenizer=BYTES):
    """The text of each run of trained tokens, in which <|eos|> is EOS."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.mask, [0]])))
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    runs = [document.tokens[a:b] for a, b in edges.reshape(-1, 2)]
    return ["".join(names.get(int(i), "") or chr(i) for i in x).encode("latin1").decode() for x in runs]


def with_specials(tmp_path, *names):
    """A byte-level tokenizer with special tokens of these names."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    t = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(alphabet)}, []))
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = tokenizers.decoders.ByteLevel()
    t.add_special_tokens(list(names))
    t.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_the_turns_of_the_assistant_and_their_ends_are_trained_on_and_their_headers_are_not():
    document = read({"messages": TALK})
    text = "system:\nbe kind\n\nuser:\nhi é\n\nassistant:\nyo 東<|eos|>\nuser:\nbye\n\nassistant:\nok<|eos|>"
    assert document.text.decode() == text
    assert trained(document) == ["yo 東<|eos|>", "ok<|eos|>"]
    assert BYTES.decode(document.tokens) == text.replace("<|eos|>", "")
    assert document.tokens[0] == BYTES.bos and (document.tokens == BYTES.eos).sum() == 2 and document.tokens[-1] == BYTES.eos


def test_other_roles_are_trained_on_with_their_headers_where_no_generation_prompt_begins_them():
    document = read({"messages": TALK}, roles=("user", "system"))
    assert trained(document) == ["system:\nbe kind\n\nuser:\nhi é\n", "\nuser:\nbye\n"]
    assert document.mask[-1] == 0  # EOS ends the turn of the assistant


def test_tools_and_their_calls_reach_the_template():
    call = says("assistant", None, tool_calls=[{"function": {"name": "sum", "arguments": {"a": "<b>"}}}])
    document = read(
        {"messages": [says("user", "2 + 2"), call, says("tool", "4"), says("assistant", "4")], "tools": [{"name": "sum"}]}
    )
    assert document.text.startswith(b'tools:\n[{"name": "sum"}]\n\nuser:\n2 + 2\n')
    assert trained(document) == ['[{"function": {"name": "sum", "arguments": {"a": "<b>"}}}]<|eos|>', "4<|eos|>"]


def test_a_system_message_that_a_template_writes_with_the_next_is_not_lost():
    document = read({"messages": TALK}, LLAMA)
    assert document.text.decode() == "<|bos|>[INST] be kind\nhi é [/INST] yo 東<|eos|>[INST] bye [/INST] ok<|eos|>"
    assert trained(document) == [" yo 東<|eos|>", " ok<|eos|>"]
    assert (document.tokens == BYTES.bos).sum() == 1 and (document.tokens == BYTES.eos).sum() == 2


def test_special_tokens_of_a_template_are_ids_and_boundaries_are_never_doubled(tmp_path):
    tokenizer = with_specials(tmp_path, "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    start, end = (tokenizer.special_tokens[x] for x in ("<|im_start|>", "<|im_end|>"))
    document = read({"messages": TALK}, CHATML, tokenizer=tokenizer)
    ids = document.tokens.tolist()
    assert [ids.count(x) for x in (start, end, tokenizer.bos, tokenizer.eos)] == [5, 5, 1, 1]
    assert [document.mask[i] for i, x in enumerate(ids) if x == end] == [0, 0, 1, 0, 1]
    assert not any(document.mask[i] for i, x in enumerate(ids) if x == start)
    assert document.mask[-1] == 1  # the template ends no text with EOS: it belongs to the last turn
    own = read({"messages": TALK}, "{{ bos_token }}" + CHATML.replace("<|im_end|>", "{{ eos_token }}"), tokenizer=tokenizer)
    assert own.tokens.tolist().count(tokenizer.bos) == 1 and own.tokens.tolist().count(tokenizer.eos) == 5
    assert (
        own.tokens[-1] == tokenizer.eos and own.tokens[-2] == tokenizer.encode(b"k")[0] and own.mask[-3:].tolist() == [1, 1, 1]
    )


def test_texts_of_prompts_and_completions_are_joined_without_a_template():
    document = read({"prompt": "2 + 2 = <|eos|>", "completion": "4"}, template=None)
    assert document.text == b"2 + 2 = <|eos|>4" and len(document.tokens) == len(document.text) + 2
    assert document.mask.tolist() == [0] * 16 + [1, 1]
    assert read({"prompt": "", "completion": "4"}, template=None).mask.tolist() == [0, 1, 1]


@pytest.mark.parametrize("prompt", ["2 + 2?", [says("user", "2 + 2?")]])
@pytest.mark.parametrize(
    "completion", ["4", says("assistant", "4"), [says("assistant", "4")], [says("user", "2 + 2?"), says("assistant", "4")]]
)
def test_messages_of_prompts_and_completions_are_those_of_a_conversation(prompt, completion):
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt = [says("user", prompt)]
    document, expected = (
        read(x)
        for x in ({"prompt": prompt, "completion": completion}, {"messages": [says("user", "2 + 2?"), says("assistant", "4")]})
    )
    assert document.text == expected.text and document.mask.tolist() == expected.mask.tolist()


def test_turns_of_a_prompt_are_not_trained_on():
    assert trained(read({"prompt": TALK[:4], "completion": "ok"})) == ["ok<|eos|>"]


THINKS = "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:1] }}\n{% endfor %}"
LOSES = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"


@pytest.mark.parametrize(("record", "template", "message"), [
    ({"messages": TALK}, THINKS, "with message 2, of the role 'user', the chat template changes the text of those"),
    ({"messages": TALK}, LOSES, "the chat template leaves out message 1, of the role 'system'"),
    ({"messages": TALK}, LOSES.replace("system", "assistant"), "the chat template leaves out message 3, of the role"),
    ({"messages": TALK}, "{{ messages[9].content.x }}", "the chat template fails: "),
    ({"messages": TALK}, "{{ messages.append(1) }}", "the chat template fails: access to attribute 'append'"),
    ({"messages": TALK}, "{{ messages.__class__.__mro__ }}", "the chat template fails: access to attribute '__class__'"),
    ({"messages": [says("wizard", "x"), *TALK]}, PLAIN, "the chat template fails: the role wizard is none of system, user"),
    ({"messages": [says("wizard", "x"), *TALK[1:]]}, LLAMA, "the chat template fails: unknown role wizard"),
    ({"messages": TALK[:2]}, PLAIN, "no token is trained on: the roles are system, user; .* as --train_roles says"),
    ({"messages": [says("user", "say <|eos|>"), *TALK[2:]]}, PLAIN, r"a message spells '<\|eos\|>', which is a special token"),
    ({"messages": TALK, "tools": [{"<|bos|>": 1}]}, PLAIN, r"a message spells '<\|bos\|>', which is a special token"),
    ({"messages": TALK, "tools": "[]"}, PLAIN, "the field 'tools' is of type str, not a list"),
    ({"messages": TALK}, None, "it has messages, and there is no chat template; name one with --chat_template"),
    ({"messages": []}, PLAIN, "the field 'messages' has no message"),
    ({"messages": "hi"}, PLAIN, "the field 'messages' is of type str, not a list of messages"),
    ({"messages": ["hi"]}, PLAIN, "message 1 of the field 'messages' is not an object with role and content"),
    ({"messages": [{"content": "hi"}]}, PLAIN, "message 1 of the field 'messages' has no role that is text"),
    ({"messages": [says("user", 3)]}, PLAIN, "message 1 of the field 'messages' has content of type int, not text"),
    ({"prompt": "x"}, PLAIN, "there is no field 'messages', nor 'prompt' and 'completion': the record has 'prompt'"),
    ({"prompt": "x", "completion": " "}, PLAIN, "its 'completion' is empty"),
    ({"prompt": "x", "completion": [says("assistant", "")]}, PLAIN, "its 'completion' is empty"),
    ({"prompt": "x", "completion": 3}, PLAIN, "the field 'completion' is of type int, not a list of messages"),
    ([1], PLAIN, "it is not a record"),
])  # fmt: skip
def test_a_wrong_record_is_refused_by_file_and_line_and_nothing_is_written(tmp_path, record, template, message):
    lines = [{"prompt": "a", "completion": "b"}, record, {"prompt": "a", "completion": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    options = {"form": "jsonl", "fields": FIELDS, "inputs": "a.jsonl", "chat": Chat("chat", template, ("assistant",))}
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {message}") as refused:
        run(tmp_path, **options)
    assert "\n" not in str(refused.value) and not (tmp_path / "out" / store.MANIFEST).exists()
    summary, said = run(tmp_path, **options, on_error="skip")
    assert summary["documents"] == 2 and summary["skipped"]["broken"] == 1 and "a.jsonl, line 2: " in said[0]


def test_a_conversation_of_too_many_tokens_is_refused():
    assert len(read({"prompt": "ab", "completion": "c"}, max_tokens=5).tokens) == 5
    with pytest.raises(ValueError, match="the conversation has 6 tokens, and --max_tokens=5 is the limit"):
        read({"prompt": "abc", "completion": "d"}, max_tokens=5)


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(ValueError, match="the chat template is not Jinja: line 2: "):
        chat.Template("a\n{% if %}", BYTES)


def test_blocks_that_mark_generated_text_are_read():
    template = chat.Template("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", BYTES)
    assert template.render(TALK[:2]) == "be kindhi é"


def write_talks(tmp_path, number=12):
    turns = [[says("user", "question " * (i % 5)), says("assistant", "answer " * (1 + i % 4))] for i in range(number)]
    talks = [{"messages": x, "from": "ab"[i % 2]} for i, x in enumerate(turns)]
    (tmp_path / "raw").mkdir()
    for i in range(0, number, 5):
        (tmp_path / f"raw/{i}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in talks[i : i + 5]))
    return talks


def test_a_store_of_conversations_has_their_tokens_and_masks_and_the_text_of_the_template(tmp_path):
    talks = write_talks(tmp_path)
    form = Chat("chat", PLAIN, ("assistant",))
    options = {"form": "jsonl", "fields": Fields("text", "from"), "chat": form, "inputs": "raw"}
    run(tmp_path, **options)
    run(tmp_path, "parallel", workers=2, **options)
    assert content(tmp_path / "out") == content(tmp_path / "parallel")
    assert run(tmp_path, **options)[1] == [f"{tmp_path}/out is complete"]
    manifest, corpus = store.read_manifest(str(tmp_path / "out")), store.load(str(tmp_path / "out"), BYTES)
    assert (manifest.chat_template, manifest.pairs, corpus.paired) == (PLAIN, False, False)
    assert "pairs" not in json.loads((tmp_path / "out/manifest.json").read_text())
    assert len(list(store.verify(str(tmp_path / "out"), BYTES))) == len(manifest.shards)
    by_hash = {documents.content_hash(x.text): x for x in map(read, talks)}
    for i, (n, text_hash) in enumerate(zip(corpus.lengths, corpus.hashes, strict=True)):
        expected = by_hash[int(text_hash)]
        assert corpus.read([(i, 0, n)])[0].tolist() == expected.tokens.tolist()
        assert corpus.read_loss_mask([(i, 0, n)])[0].tolist() == expected.mask.tolist()
    with pytest.raises(ValueError, match="was begun with chat=.*, and now it is .*; use what it was begun with"):
        run(tmp_path, **options | {"chat": Chat("chat", PLAIN + " ", ("assistant",))})


def test_a_manifest_with_another_template_or_pairs_of_another_type_is_damaged(tmp_path):
    write_talks(tmp_path)
    run(tmp_path, form="jsonl", fields=FIELDS, chat=Chat("chat", PLAIN, ("assistant",)), inputs="raw")
    values = json.loads((tmp_path / "out/manifest.json").read_text())
    for wrong, message in (
        ({"chat_template": 3}, "its chat_template is not text"),
        ({"pairs": 1}, "its pairs are not true or false"),
    ):
        (tmp_path / "out/manifest.json").write_text(json.dumps(values | wrong))
        with pytest.raises(ValueError, match=f"manifest.json is damaged: {message}"):
            store.load(str(tmp_path / "out"))
    del values["chat_template"]  # as older versions wrote it
    (tmp_path / "out/manifest.json").write_text(json.dumps(values))
    assert store.read_manifest(str(tmp_path / "out")).chat_template is None


def test_a_tokenizers_own_template_is_beside_it(tmp_path):
    name = str(tmp_path / "tokenizer.json")
    assert chat.load_template(None, name) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ one }}"}))
    assert chat.load_template(None, name) == "{{ one }}"
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]}))
    assert chat.load_template(None, name) == "y"
    (tmp_path / "chat_template.jinja").write_text("{{ two }}")
    assert chat.load_template(None, name) == "{{ two }}"
    (tmp_path / "mine.jinja").write_text("mine")
    assert chat.load_template(str(tmp_path / "mine.jinja"), name) == "mine"
    with pytest.raises(ValueError, match="--chat_template=none.jinja is not a file"):
        chat.load_template("none.jinja", name)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ValueError, match="its chat_template is not text; name a template with --chat_template"):
        chat.load_template(None, name)


def test_options_of_conversations_go_to_worker_processes():
    form = Chat("preference", PLAIN, ("assistant", "tool"), 7)
    assert pickle.loads(pickle.dumps(form)) == form and form.pairs


@pytest.mark.parametrize(("arguments", "message"), [
    (["--format=chat", "--text_field=x"], "--text_field belongs to other formats; leave it out, or change --format"),
    (["--format=preference", "--loss_field=x"], "--loss_field belongs to other formats; leave it out"),
    (["--train_roles=user"], "--train_roles belongs to --format=chat and --format=preference; leave it out"),
    (["--format=jsonl", "--max_tokens=9"], "--max_tokens belongs to --format=chat and --format=preference"),
    (["--format=chat", "--train_roles="], "--train_roles has no role; name roles of messages"),
    (["--format=chat", "--chat_template=none"], "--chat_template=none is not a file; name a file with a Jinja template"),
])  # fmt: skip
def test_the_program_refuses_flags_that_do_not_belong_together(tmp_path, capsys, arguments, message):
    with tool("prepare_data") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.main(parse(["prepare_data.py", f"--input={tmp_path}", f"--out={tmp_path}/out", "--workers=1", *arguments]))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {message}") and error.count("\n") == 1, error


def test_the_program_makes_a_store_of_conversations(tmp_path, capsys):
    write_talks(tmp_path)
    (tmp_path / "mine.jinja").write_text(CHATML)
    flags = ["--format=chat", "--train_roles=assistant,user", f"--chat_template={tmp_path}/mine.jinja", "--label_field=from"]
    with tool("prepare_data") as module, flagsaver.flagsaver():
        module.main(parse(["prepare_data.py", f"--input={tmp_path}/raw", f"--out={tmp_path}/out", "--workers=1", *flags]))
    assert "label        a: 6 documents, " in capsys.readouterr().out
    assert store.read_manifest(str(tmp_path / "out")).chat_template == CHATML


def test_the_loss_of_a_packed_conversation_is_that_of_the_conversation_alone(tmp_path, one_device):
    write_talks(tmp_path)
    run(tmp_path, form="jsonl", fields=FIELDS, chat=Chat("chat", PLAIN, ("assistant",)), inputs="raw")
    corpus = store.load(str(tmp_path / "out"), BYTES)
    c = tiny({"stages[0].seq_len": 256})
    params, compute = random_params(c.model), jax.jit(losses, static_argnums=(0, 3))

    def loss_of(sequence):
        batch = {name: x[None] for name, x in sequence.items()}
        return np.asarray(compute(c.model, params, batch, BLOCKED)[0])[0] * sequence["weights"]

    (packed, *_) = PackedSequences(corpus, 256, None, BYTES.byte_lengths, "best_fit")
    together, number = loss_of(packed), packed["segments"].max()
    assert number > 2
    alone = {}
    for i in range(len(corpus)):
        mask = np.arange(len(corpus)) == i
        (sequence,) = PackedSequences(corpus.select(mask), 256, None, BYTES.byte_lengths, "best_fit")
        alone[sequence["tokens"][: corpus.lengths[i]].tobytes()] = loss_of(sequence)[: corpus.lengths[i]]
    for segment in range(1, number + 1):
        of_segment = packed["segments"] == segment
        expected = alone[packed["tokens"][of_segment].tobytes()]
        assert expected.any()
        assert_close(together[of_segment], expected, 1e-5)
