"""Conversations have the text and the tokens that transformers gives them with the same template."""

import pytest
import transformers
from test_chat import CHATML, LLAMA, PLAIN, TALK, read, says, with_specials

NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds é <b>", "parameters": {}}}]
CALL = says("assistant", "", tool_calls=[{"function": {"name": "sum", "arguments": {"a": "<é>"}}}])
CALLS = (
    "{{ tools | tojson(indent=2) }}"
    "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{{ m | tojson }}\n{% endfor %}"
)
MARKED = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}").replace(
    "<|im_end|>\n", "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}"
)


def of_transformers(tmp_path, template):
    path = str(tmp_path / "tokenizer.json")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=path, chat_template=template, **names)


def test_the_turns_that_are_trained_on_are_those_of_a_template_that_marks_them(tmp_path):
    tokenizer = with_specials(tmp_path, *NAMES)
    theirs = of_transformers(tmp_path, MARKED).apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    document = read({"messages": TALK}, CHATML, tokenizer=tokenizer)
    assert 0 < sum(theirs["assistant_masks"]) < len(theirs["input_ids"])
    assert document.tokens[1:-1].tolist() == theirs["input_ids"]
    assert document.mask[1:-1].tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, CHATML, LLAMA, CALLS], ids=["plain", "chatml", "llama", "calls"])
@pytest.mark.parametrize("messages", [TALK, [says("user", "2 + 2"), CALL, says("user", " so? "), says("assistant", " 4\n")]])
def test_text_and_tokens_are_those_of_transformers(tmp_path, template, messages):
    tokenizer = with_specials(tmp_path, *NAMES)
    theirs = of_transformers(tmp_path, template)
    document = read({"messages": messages, "tools": TOOLS}, template, tokenizer=tokenizer)
    assert document.text.decode() == theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    expected = theirs.apply_chat_template(messages, tools=TOOLS, return_dict=False)
    ours = document.tokens.tolist()
    written = (expected[:1] == [tokenizer.bos], expected[-1:] == [tokenizer.eos])
    assert ours[1 - written[0] : len(ours) - 1 + written[1]] == expected
