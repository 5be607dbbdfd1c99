"""Retrieval-augmented generation over a few text files: the passages that share most words with a question answer it.

Retrieval is BM25 (Robertson and Zaragoza, 2009) in a dozen lines; questions about the same passage share its prefix.

    python -m actorserve.examples.rag [FOLDER]
"""

import re
import sys
from collections import Counter
from math import log
from pathlib import Path
from typing import Any

import actorserve.lang as sgl

NOTES = Path(__file__).parent / "notes"
QUESTIONS = ("When was the lighthouse built?", "What does the bakery sell on Fridays?", "How long is the ferry ride?")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def passages(folder: Path) -> list[tuple[str, str]]:
    """(file's name, paragraph) of all text files in a folder."""
    files = sorted(folder.glob("*.txt"))
    return [(f.name, p.strip()) for f in files for p in f.read_text(encoding="utf-8").split("\n\n") if p.strip()]


def best(question: str, found: list[tuple[str, str]], k1: float = 1.2, b: float = 0.75) -> tuple[str, str]:
    """The passage with the highest BM25 score for a question."""
    texts = [words(passage) for _, passage in found]
    mean = sum(map(len, texts)) / len(texts)
    having = Counter(word for text in texts for word in set(text))

    def score(text: list[str]) -> float:
        counts, length = Counter(text), 1 - b + b * len(text) / mean
        rarity = {w: log(1 + (len(texts) - having[w] + 0.5) / (having[w] + 0.5)) for w in words(question)}
        return sum(rarity[w] * counts[w] * (k1 + 1) / (counts[w] + k1 * length) for w in words(question))

    return max(zip(found, texts, strict=True), key=lambda pair: score(pair[1]))[0]


@sgl.function
def ask(s: Any, passage: str, question: str) -> None:
    s += sgl.system("Answer the question from the text, in one short sentence.")
    s += sgl.user("Text: " + passage + "\n\nQuestion: " + question)
    s += sgl.assistant(sgl.gen("answer"))


def main(backend: Any, folder: Path = NOTES) -> None:
    found = [best(question, passages(folder)) for question in QUESTIONS]
    batch = [{"passage": p, "question": q} for q, (_, p) in zip(QUESTIONS, found, strict=True)]
    states = ask.run_batch(batch, backend=backend, temperature=0, max_new_tokens=32)
    for question, (name, _), state in zip(QUESTIONS, found, states, strict=True):
        print(f"{question}\n  {state['answer']}  [{name}]")


if __name__ == "__main__":
    with sgl.Engine() as engine:
        main(engine, *map(Path, sys.argv[1:2]))
