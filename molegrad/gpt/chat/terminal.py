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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from molegrad.gpt import runs as stages
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model import engine
from molegrad.gpt.model.gpt import GPT
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
    """A conversation with a model.

    Args:
        fine_tuned: False makes every text a new start that the model continues.
        temperature, top_k, seed, max_new_tokens: as the flags; top_k 0 is no limit. Answer i of a
            conversation draws from seed + i, so a whole conversation repeats.
        notice: called with a line that the user should see.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        fine_tuned: bool = True,
        temperature: float = 0.6,
        top_k: int = 50,
        seed: int = 42,
        max_new_tokens: int = 256,
        notice: Callable[[str], None] = print,
    ):
        self.model, self.tokenizer, self.fine_tuned = model, tokenizer, fine_tuned
        self.temperature, self.top_k, self.seed = temperature, top_k, seed
        self.max_new_tokens, self.notice = max_new_tokens, notice
        self.messages: list[dict] = []
        self._told_overflow = False
        self._answers = 0

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages.clear()
        self._told_overflow = False
        self._answers = 0

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer to `text` piece by piece, whole characters at a time.

        The answer joins the conversation when the iterator ends, or is closed: what was said until
        then counts as said.

        Raises:
            PromptTooLong: `text` alone does not fit; the conversation is as it was before.
        """
        prompt = self._prompt(text)
        stop = set(self.tokenizer.special_tokens.values())
        tokens = engine.generate(
            self.model,
            prompt,
            self.max_new_tokens,
            self.temperature,
            self.top_k or None,
            self.seed + self._answers,
            stop,
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
        room = context - min(self.max_new_tokens, context // 4)
        if not self.fine_tuned:
            prompt = [self.tokenizer.bos, *self.tokenizer.encode(text)]
            return self._fitting(prompt, room)
        kept = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.render_for_completion({"messages": kept})
        while len(prompt) > room and len(kept) > 1:
            kept = kept[2:]
            prompt = self.tokenizer.render_for_completion({"messages": kept})
        self._fitting(prompt, room)
        dropped = len(self.messages) + 1 - len(kept)
        if dropped:
            del self.messages[:dropped]
            if not self._told_overflow:
                self._told_overflow = True
                self.notice(
                    f"(the conversation no longer fits the context of {context} tokens: the "
                    "oldest turns are forgotten from now on)"
                )
        return prompt

    def _fitting(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) > room:
            raise PromptTooLong(
                f"this message has {len(prompt)} tokens; {room} fit the context of "
                f"{self.model.config.max_seq_len} beside an answer: shorten it"
            )
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


def chat_cli(
    config: ChatConfig,
    read: Callable[[str], str] = input,
    write: Callable[[str], object] | None = None,
) -> int:
    """Chat until /quit or the end of the input; 0.

    Args:
        read: shows its argument and returns a line, or raises EOFError.
        write: shows text as it is, without a line's end; standard output by default.
    """
    write = write or _write
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device_type)
    stage = config.stage
    if stage == "auto":
        stage = stages.newest_stage(config.run, config.model_tag)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    opened = stages.open_stage(config.run, stage, config.model_tag, config.step, device, dtype)
    fine_tuned = stage == "sft"
    chat = Chat(
        opened.model,
        opened.tokenizer,
        fine_tuned,
        config.temperature,
        config.top_k,
        config.seed,
        config.max_new_tokens,
        notice=lambda line: write(line + "\n"),
    )
    note = "" if fine_tuned else _NOT_FINE_TUNED.format(run=config.run)
    if config.prompt:
        if note:
            print(note, file=sys.stderr)  # standard output is the answer alone
        return 0 if _answer(chat, config.prompt, write) else 2
    write(f"{opened.name} on {device_name(device)}. /clear forgets, /quit leaves.\n")
    if note:
        write(note + "\n")
    _converse(chat, read, write)
    return 0


_NOT_FINE_TUNED = (
    "This is a base model: it is not fine-tuned for conversation and continues your text instead "
    "of answering it. Fine-tune it with: python -m scripts.chat_sft --run={run}"
)


def _converse(chat: Chat, read: Callable[[str], str], write: Callable[[str], object]) -> None:
    while True:
        try:
            text = read("\nyou> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n(/quit leaves)\n")
            continue
        if text == "/quit":
            return
        if text == "/clear":
            chat.clear()
            write("(the conversation is forgotten)\n")
        elif text.startswith("/"):
            write(f"(there is no {text.split()[0]}; there are /clear and /quit)\n")
        elif text:
            write("model> ")
            _answer(chat, text, write)


def _answer(chat: Chat, text: str, write: Callable[[str], object]) -> bool:
    """Stream one answer; whether there was one."""
    pieces = chat.reply(text)
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        write(" (stopped)")
    except PromptTooLong as error:
        write(f"({error})\n")
        return False
    finally:
        pieces.close()
    write("\n")
    return True


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
