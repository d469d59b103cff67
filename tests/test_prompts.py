"""Messages become the tokens that a model was trained to continue, and what cannot be answered is named by its line."""

import json

import pytest
from test_chat import BYTES, CHATML, LLAMA, PLAIN, TALK, read, says, with_specials

from hybrid_attn.infer import prompts
from hybrid_attn.infer.prompts import Requests


@pytest.mark.parametrize("template", [PLAIN, CHATML, LLAMA], ids=("plain", "chatml", "llama"))
@pytest.mark.parametrize("turns", [2, 4])
def test_a_request_is_the_beginning_of_the_document_that_has_the_answer(template, turns, tmp_path):
    tokenizer = BYTES if template == PLAIN else with_specials(tmp_path, "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    document = read({"messages": TALK[: turns + 1]}, template, tokenizer=tokenizer).tokens.tolist()
    ids = Requests(tokenizer, template).ids(TALK[:turns])
    assert document[: len(ids)] == ids and ids.count(tokenizer.bos) == 1
    answer = tokenizer.decode(document[len(ids) :])
    assert answer.strip("\n ") == TALK[turns]["content"]
    assert Requests(tokenizer, template, bos=False).ids(TALK[:turns]) == ids[1:]


NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML.replace("m.content", "m.content | tojson"), [says("user", "4?"), says("tool", 'the "sum"\nis 4')]),
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), [*TALK[:2], says("assistant", "a</think>b"), TALK[3]]),
        (CHATML, [says("user", "4?"), says("assistant", None, tool_calls=[{"name": "sum"}]), says("tool", "4")]),
        (LLAMA.replace("messages[1:]", "messages[1:] if messages[1] else raise_exception('none')"), TALK[:2]),
    ],
)
def test_a_message_may_be_written_otherwise_than_it_is(template, messages):
    assert Requests(BYTES, template).ids(messages)


def test_an_answer_ends_with_the_token_that_ends_a_turn(tmp_path):
    tokenizer = with_specials(tmp_path, "<s>", "</s>", "<|im_start|>", "<|im_end|>")
    assert Requests(tokenizer, CHATML).ends() == [tokenizer.special_tokens["<|im_end|>"]]
    assert Requests(BYTES, PLAIN).ends() == [BYTES.eos]
    assert Requests(BYTES, "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}").ends() == [
        BYTES.bos
    ]
    assert Requests(BYTES, PLAIN).end_texts() == Requests(tokenizer, CHATML).end_texts() == []


@pytest.mark.parametrize(
    ("template", "texts"),
    [
        (CHATML, ["<|im_end|>\n<|im_start|>user\n"]),  # plain characters to bytes
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", []),  # a line break ends no answer
        (None, []),
        ("{{ raise_exception('a system message comes first') }}", []),
        ("{{ bos_token }}{{ messages[0].content }}", []),
    ],
)
def test_where_no_special_token_ends_an_answer_the_text_before_the_next_turn_does(template, texts):
    requests = Requests(BYTES, template)
    assert requests.ends() == [] and requests.end_texts() == texts


def test_tools_reach_the_template_of_a_request():
    ids = Requests(BYTES, PLAIN).ids([says("user", "hi")], [{"name": "sum"}])
    assert BYTES.decode(ids) == 'tools:\n[{"name": "sum"}]\n\nuser:\nhi\n\nassistant:\n'


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, [says("user", "hi")], "there is no chat template; put a chat_template.jinja beside the tokenizer.json (or"),
        (PLAIN, [says("robot", "hi")], "the chat template fails: the role robot is none of system, user, assistant and tool"),
        (PLAIN, [says("user", "a<|eos|>b")], "a message spells '<|eos|>', which is a special token; only the template may"),
        (
            "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
            [says("system", "be kind"), says("user", "hi")],
            "the chat template leaves out message 2, of the role 'user'",
        ),
        (NO_SYSTEM, [says("system", "hi"), says("user", "hi")], "the chat template leaves out message 1, of the role 'system'"),
        ("{{ messages[-1].content }}", TALK[:2], "the chat template leaves out message 1, of the role 'system'"),
        ("{% for m in messages %}{{ m.role }}: {% endfor %}", TALK[:2], "the chat template leaves out message 1, of the"),
    ],
)
def test_messages_that_a_template_does_not_write_are_refused(template, messages, said):
    with pytest.raises(ValueError) as error:
        Requests(BYTES, template).prompts({"in.jsonl:3": {"messages": messages}})
    assert str(error.value).startswith(f"in.jsonl:3: {said}")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, ' has neither of "prompt" and "messages"; give one of them'),
        ({"prompt": "a", "messages": [says("user", "hi")]}, ' has both of "prompt" and "messages"; give one of them'),
        ({"prompt": ["a"]}, ' has no text under "prompt"'),
        ({"prompt": ""}, ' has no text under "prompt"'),
        ({"messages": "hi"}, ": the field 'messages' is of type str, not a list of messages"),
        ({"messages": []}, ": the field 'messages' has no message"),
        ({"messages": ["hi"]}, ": message 1 of the field 'messages' is not an object with role and content"),
        ({"messages": [says("user", "hi"), {"content": "a"}]}, ": message 2 of the field 'messages' has no role that is text"),
        ({"messages": [says("user", 3)]}, ": message 1 of the field 'messages' has content of type int, not text"),
        ({"messages": [says("user", " \n")]}, ": the last message, of the role 'user', has no text"),
        ({"messages": TALK}, ": the last message is the assistant's; end with one that it is to answer"),
        ({"messages": TALK[:2], "tools": "sum"}, ": the field 'tools' is of type str, not a list"),
        ({"messages": TALK[:2], "question": "a"}, ' has a "question" beside messages; make it the last message'),
    ],
)
def test_a_line_without_a_prompt_is_named(values, said, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n\n' + json.dumps(values) + "\n")
    with pytest.raises(ValueError) as error:
        prompts.read(str(tmp_path / "in.jsonl"))
    assert str(error.value) == f"{tmp_path}/in.jsonl:3{said}"
