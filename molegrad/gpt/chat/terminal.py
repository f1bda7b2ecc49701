"""Chat in the terminal with a trained model.

What: `Chat` holds a conversation and streams answers; `chat_cli(config)` is the terminal around it.

A fine-tuned model sees the conversation in its special tokens and answers until <|assistant_end|>.
A base model has never seen these: it continues each text that is given, and is announced so.

How to run:

    python -m scripts.chat_cli --run=first
    python -m scripts.chat_cli --run=first --prompt="What is 12 + 7?" --temperature=0

In the terminal: /clear forgets the conversation, /quit leaves, Ctrl-C stops an answer.
"""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from molegrad.gpt import runs
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model import engine
from molegrad.gpt.train import flags
from molegrad.gpt.train.flags import flag
from molegrad.gpt.train.hardware import device_name, pick_device


@dataclass(frozen=True)
class ChatConfig:
    """Chat with a trained model in the terminal.

    /clear forgets the conversation, /quit leaves, Ctrl-C stops an answer.
    """

    run: str = flag("dummy", "name of the run whose model answers")
    stage: Literal["auto", "base", "sft"] = flag(
        "auto", "which model: sft (fine-tuned), base, or auto: sft where there is one"
    )
    model_tag: str = flag("", "suffix of the stage's folder, as in training")
    step: int = flag(-1, "checkpoint to open; -1 is the newest")
    device_type: str = flag("", "cuda, cpu or mps; empty takes the best there is")
    threads: int = flag(0, "CPU threads of torch; 0 leaves torch's choice")
    prompt: str = flag("", "answer this once and leave; empty starts a conversation")
    temperature: float = flag(0.6, "0 takes the most likely token, larger is more varied")
    top_k: int = flag(50, "sample among this many tokens; 0 is no limit")
    seed: int = flag(42, "seed of the sampling")
    max_new_tokens: int = flag(256, "longest answer in tokens")

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


class PromptTooLong(ValueError):
    """A single message does not fit the model's context."""


class Chat:
    """A conversation with an opened model, by the sampling settings of a ChatConfig.

    A base model takes every text as a new start. Answer i draws from seed + i, so that a whole
    conversation repeats.

    Attributes:
        messages: the conversation, {"role", "content"} each.
        forgotten: whether turns were dropped because the context was full.
    """

    def __init__(self, opened: runs.OpenStage, config: ChatConfig):
        self.model, self.tokenizer, self.config = opened.model, opened.tokenizer, config
        self.fine_tuned = opened.stage == "sft"
        self.clear()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages: list[dict] = []
        self.forgotten = False
        self._answers = 0

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer to `text` piece by piece, whole characters at a time.

        The answer joins the conversation when the iterator ends, or is closed: what was said until
        then counts as said.

        Raises:
            PromptTooLong: `text` alone does not fit; the conversation is as it was before.
        """
        c = self.config
        tokens = engine.generate(
            self.model,
            self._prompt(text),
            c.max_new_tokens,
            c.temperature,
            c.top_k or None,
            c.seed + self._answers,
            self.tokenizer.special_tokens.values(),
        )
        self._answers += 1
        said = []
        try:
            for piece in stream_text(tokens, self.tokenizer):
                said.append(piece)
                yield piece
        finally:
            if self.fine_tuned:
                self.messages.append({"role": "user", "content": text})
                self.messages.append({"role": "assistant", "content": "".join(said)})

    def _prompt(self, text: str) -> list[int]:
        """The tokens to continue; the oldest turns are dropped where they do not fit."""
        context = self.model.config.max_seq_len
        room = context - min(self.config.max_new_tokens, context // 4)
        kept = [*self.messages, {"role": "user", "content": text}]
        while True:
            if self.fine_tuned:
                prompt = self.tokenizer.render_for_completion({"messages": kept})
            else:
                prompt = [self.tokenizer.bos, *self.tokenizer.encode(text)]
            if len(prompt) <= room:
                break
            if len(kept) == 1:
                raise PromptTooLong(
                    f"this message has {len(prompt)} tokens; {room} fit the context of {context} "
                    "beside an answer: shorten it"
                )
            kept = kept[2:]
        self.forgotten = self.forgotten or len(kept) <= len(self.messages)
        self.messages = kept[:-1]
        return prompt


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of `tokens` as they come. A character whose UTF-8 bytes are spread over tokens is
    held back until it is whole; bytes that are no UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if piece := decoder.decode(tokenizer.decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


@flags.command("chat_cli")
def main(argv: list[str] | None = None) -> int:
    """The command."""
    return chat_cli(flags.parse(ChatConfig, argv, prog="python -m scripts.chat_cli"))


def chat_cli(config: ChatConfig) -> int:
    """Chat on standard input and output until /quit or the end of the input: 0; or answer the one
    prompt: 2 where it does not fit."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device_type)
    stage = config.stage
    if stage == "auto":
        stage = runs.newest_stage(config.run, config.model_tag)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = runs.open_stage(config.run, stage, config.model_tag, config.step, device, dtype)
    chat = Chat(opened, config)
    if not config.prompt:
        print(f"{opened.name} on {device_name(device)}. /clear forgets, /quit leaves.")
    if not chat.fine_tuned:
        print(
            "This is a base model: it is not fine-tuned for conversation and continues your text "
            f"instead of answering it. Fine-tune it with: python -m scripts.chat_sft "
            f"--run={config.run}",
            # Of one prompt standard output is the answer alone.
            file=sys.stderr if config.prompt else sys.stdout,
        )
    if config.prompt:
        return 0 if _answer(chat, config.prompt) else 2
    _converse(chat)
    return 0


def _converse(chat: Chat) -> None:
    while True:
        try:
            text = input("\nyou> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit leaves)")
            continue
        if text == "/quit":
            return
        if text == "/clear":
            chat.clear()
            print("(the conversation is forgotten)")
        elif text.startswith("/"):
            print(f"(there is no {text.split()[0]}; there are /clear and /quit)")
        elif text:
            _answer(chat, text, "model> ")


def _answer(chat: Chat, text: str, name: str = "") -> bool:
    """Stream one answer; whether there was one."""
    before = chat.forgotten
    pieces = chat.reply(text)
    print(name, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except PromptTooLong as error:
        print(f"({error})")
        return False
    finally:
        pieces.close()
    print()
    if chat.forgotten and not before:
        print("(the context is full: the oldest turns are forgotten from now on)")
    return True
