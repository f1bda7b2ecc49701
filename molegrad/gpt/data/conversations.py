"""Conversations for fine-tuning, from four sources that need no network.

    summary     "What does NAME do?" -> the first sentence of its docstring (embedded corpus)
    chatter     English exchanges of the chatterbot-corpus package, where it is installed
    spelling    "Spell the word apple" -> "a p p l e"
    arithmetic  "What is 12 + 7?" -> "12 + 7 = 19"

Training and held-out conversations are disjoint at the source: summaries by the corpus' split into
modules, the others by a hash of the question's subject (the first message, the word, the operands).
Everything is a function of the corpus and a seed.
"""

import hashlib
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molegrad.gpt.data.corpus import SPLITS, Corpus, check_split, is_validation

HELD_OUT_FRACTION = 0.1
WEIGHTS = {"summary": 0.5, "chatter": 0.2, "spelling": 0.15, "arithmetic": 0.15}
MAX_MESSAGES = 10
_SUMMARY_QUESTIONS = ("What does {} do?", "Describe {}", "What is {}?", "Summarize {}")
_SPELLING_QUESTIONS = ("Spell the word {}", "How do you spell {}?", "Spell {}")
_ARITHMETIC_QUESTIONS = ("What is {}?", "Calculate {}", "{} = ?")
# A sentence ends at . ! or ? before a blank, but not after "e.g." and its like.
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)(?<!\betc)(?<!\bno)[.!?](?=\s|$)")
_SIGNATURE = re.compile(r"^[\w.*\[\], ]*\(.*(\)|->.*)$|->", re.DOTALL)
_MARKUP = re.compile(r":\w+(?::\w+)*:`~?([^`<]*?)(?:\s*<[^>]*>)?`|``?([^`]+)``?")
_WORD = re.compile(r"\b[a-z]{3,10}\b")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SummaryPair:
    """An object's full name and the first sentence of its docstring."""

    name: str
    summary: str
    module: str
    kind: str


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring as one line without markup; "" where there is none.

    A first paragraph that is a signature ("abs(input) -> Tensor") is skipped. Sentences outside 12
    to 200 characters, and those that are mostly symbols, don't count.
    """
    for paragraph in doc.split("\n\n")[:3]:
        line = " ".join(paragraph.split())
        if _SIGNATURE.search(line):
            continue
        if line.startswith((">>>", "..", "=", "-", "*")):
            return ""
        line = _MARKUP.sub(lambda match: match.group(1) or match.group(2) or "", line)
        end = _END.search(line)
        sentence = (line[: end.end()] if end else line).strip()
        letters = sum(character.isalpha() or character == " " for character in sentence)
        if not 12 <= len(sentence) <= 200 or letters < 0.7 * len(sentence):
            return ""
        return sentence
    return ""


def summary_pairs(corpus: Corpus, split: str) -> list[SummaryPair]:
    """(object, first sentence) pairs of the documents of a split, in the corpus' order.

    Within the result no name and no sentence occurs twice (a sentence that describes several
    objects can't tell them apart), and no name or sentence of the training split is in the
    validation one.
    A corpus without names (plain text) gives an empty list.
    """
    held_out = _unique_pairs(corpus, "val")
    if split == "val":
        return held_out
    taken = {text for pair in held_out for text in (pair.name, pair.summary)}
    return [pair for pair in _unique_pairs(corpus, split) if not taken & {pair.name, pair.summary}]


def _unique_pairs(corpus: Corpus, split: str) -> list[SummaryPair]:
    found: dict[str, SummaryPair] = {}
    for document in corpus.documents(split):
        last = document.name.rpartition(".")[2]
        if not document.name or last.startswith("__") or document.name in found:
            continue
        if sentence := first_sentence(document.doc):
            found[document.name] = SummaryPair(
                document.name, sentence, document.module, document.kind
            )
    counts = Counter(pair.summary for pair in found.values())
    return [pair for pair in found.values() if counts[pair.summary] == 1]


def _conversation(source: str, *contents: str) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"source": source, "messages": messages}


def _pick(options: tuple[str, ...], key: str) -> str:
    return options[hashlib.sha256(key.encode()).digest()[0] % len(options)]


def summary_conversation(pair: SummaryPair) -> dict:
    """The pair as a question (its wording depends on the name alone) and an answer."""
    question = _pick(_SUMMARY_QUESTIONS, pair.name).format(pair.name)
    return _conversation("summary", question, pair.summary)


def _in_split(key: str, split: str) -> bool:
    check_split(split)
    return is_validation(key, HELD_OUT_FRACTION) == (split == "val")


def chatter_conversations(split: str) -> list[dict]:
    """The English exchanges of chatterbot-corpus; [] with a warning where it is not installed.

    Conversations with the same first message are all in one split. Their end is cut to an
    assistant's message and at MAX_MESSAGES.
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        log.warning(
            "chatterbot-corpus is not installed: no chatter (pip install chatterbot-corpus)"
        )
        return []
    return read_chatter(Path(next(iter(spec.submodule_search_locations))) / "data/english", split)


def read_chatter(folder: Path, split: str) -> list[dict]:
    """The conversations in a folder of chatterbot-corpus' YAML files."""
    import yaml

    seen: set[tuple[str, ...]] = set()
    result = []
    for path in sorted(folder.glob("*.yml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for messages in data.get("conversations") or []:
            texts = tuple(" ".join(str(message).split()) for message in messages)
            texts = texts[: min(MAX_MESSAGES, len(texts) // 2 * 2)]
            if len(texts) < 2 or not all(texts) or texts in seen:
                continue
            seen.add(texts)
            if _in_split(f"chatter:{texts[0].lower()}", split):
                result.append(_conversation("chatter", *texts))
    return result


def common_words(corpus: Corpus, count: int = 4000, max_chars: int = 4_000_000) -> list[str]:
    """The most frequent words of 3 to 10 small letters in the beginning of the training text."""
    counts: Counter[str] = Counter()
    for text in corpus.texts("train"):
        counts.update(_WORD.findall(text))
        max_chars -= len(text)
        if max_chars <= 0:
            break
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ordered[:count]]


def words_of(words: list[str], split: str) -> list[str]:
    """Those of `words` that belong to a split, by a hash of the word."""
    return [word for word in words if _in_split(f"spell:{word}", split)]


def spelling_conversations(words: list[str], split: str, seed: int = 0) -> Iterator[dict]:
    """Endless spelling exercises on those of `words` that belong to a split; ValueError if none."""
    mine = words_of(words, split)
    if not mine:
        raise ValueError(f"no words for the {split} split among {len(words)}; use a larger corpus")
    rng = np.random.default_rng([seed, SPLITS.index(split), 1])
    while True:
        word = mine[rng.integers(len(mine))]
        question = _SPELLING_QUESTIONS[rng.integers(len(_SPELLING_QUESTIONS))]
        yield _conversation("spelling", question.format(word), " ".join(word))


def arithmetic_conversations(split: str, seed: int = 0) -> Iterator[dict]:
    """Endless additions and subtractions of numbers below 100, no negative results.

    The operands, in either order and for both operations, belong to one split.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), 2])
    while True:
        low, high = sorted(int(value) for value in rng.integers(0, 100, 2))
        if not _in_split(f"numbers:{low},{high}", split):
            continue
        if rng.integers(2):
            left, right = (low, high) if rng.integers(2) else (high, low)
            term, value = f"{left} + {right}", left + right
        else:
            term, value = f"{high} - {low}", high - low
        question = _ARITHMETIC_QUESTIONS[rng.integers(len(_ARITHMETIC_QUESTIONS))]
        yield _conversation("arithmetic", question.format(term), f"{term} = {value}")


def _cycle(items: list[dict], rng: np.random.Generator) -> Iterator[dict]:
    """Endless passes over `items`, each in another order."""
    while True:
        for index in rng.permutation(len(items)):
            yield items[index]


def conversation_mixture(
    corpus: Corpus,
    split: str,
    size: int,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
) -> list[dict]:
    """`size` conversations, each from a source drawn by weight; the same for the same arguments.

    split: "train" or "val" (held out). weights: source -> weight >= 0 (default WEIGHTS), made to
    sum to one. A source without conversations is left out with a warning. A conversation is
    {"source": str, "messages": [{"role", "content"}, ...]}. Finite sources go round in another
    order each time. Raises ValueError when no source is left.
    """
    check_split(split)
    weights = WEIGHTS if weights is None else weights
    rng = np.random.default_rng([seed, SPLITS.index(split), 0])

    def conversations(source: str) -> list[dict] | Iterator[dict]:
        if source == "summary":
            return [summary_conversation(pair) for pair in summary_pairs(corpus, split)]
        if source == "chatter":
            return chatter_conversations(split)
        if source == "arithmetic":
            return arithmetic_conversations(split, seed)
        words = words_of(common_words(corpus), split)
        return spelling_conversations(words, split, seed) if words else []

    streams = {}
    for source in (name for name in WEIGHTS if weights.get(name, 0) > 0):
        found = conversations(source)
        if not found:
            log.warning("conversation source %r has nothing for %s: left out", source, split)
        else:
            streams[source] = _cycle(found, rng) if isinstance(found, list) else found
    if not streams:
        raise ValueError(f"no conversations: weights {weights} leave no source with any")
    names = list(streams)
    shares = np.array([weights[name] for name in names], np.float64)
    draws = rng.choice(len(names), size=size, p=shares / shares.sum())
    return [next(streams[names[draw]]) for draw in draws]
