"""Questions whose answers stand in documents, from the files of SQuAD and HotpotQA."""

import json
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.trees import check


class Item(NamedTuple):
    """`documents` answer the question, `related` are others of the same article: indices in `Questions.documents`."""

    question: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...]


class Questions(NamedTuple):
    items: tuple[Item, ...]
    documents: tuple[str, ...]


def read_squad(path: Path) -> Questions:
    """SQuAD 2.0, such as dev-v2.0.json; questions without an answer are left out."""
    try:
        articles = json.loads(path.read_bytes())["data"]
        texts = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in articles]
        documents, index = _indexed(text for article in texts for text in article)
        items = []
        for article, around in zip(articles, texts, strict=True):
            for paragraph, own in zip(article["paragraphs"], around, strict=True):
                related = tuple(index[text] for text in around if text != own)
                for x in paragraph["qas"]:
                    if not x["is_impossible"]:
                        answers = tuple(answer["text"] for answer in x["answers"])
                        items.append(Item(x["question"], answers, (index[own],), related))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as cause:
        raise ValueError(f"{path} is no file of SQuAD 2.0 ({cause!r}); give dev-v2.0.json") from cause
    check(bool(items), f"{path} has no question with an answer")
    return Questions(tuple(items), documents)


def read_hotpot(path: Path) -> Questions:
    """HotpotQA with distractors, such as hotpot_dev_distractor_v1.json."""
    try:
        entries = json.loads(path.read_bytes())
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in entry["context"]] for entry in entries]
        documents, index = _indexed(text for own in texts for text in own)
        items = [
            Item(entry["question"], (entry["answer"],), tuple(index[text] for text in own), ())
            for entry, own in zip(entries, texts, strict=True)
        ]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as cause:
        raise ValueError(f"{path} is no file of HotpotQA ({cause!r}); give hotpot_dev_distractor_v1.json") from cause
    check(bool(items), f"{path} has no question")
    return Questions(tuple(items), documents)


def _indexed(texts) -> tuple[tuple[str, ...], dict[str, int]]:
    documents = tuple(sorted(set(texts)))
    return documents, {text: i for i, text in enumerate(documents)}
