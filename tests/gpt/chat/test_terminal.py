"""Chat: streamed characters, the conversation's state, overflow, interrupts, the command."""

import dataclasses
import re

import pytest
import torch

from molegrad.gpt import paths, runs
from molegrad.gpt.chat.terminal import Chat, ChatConfig, PromptTooLong, main, stream_text
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model import engine


@pytest.fixture(scope="module")
def opened(tiny_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(paths.ENV, str(tiny_folder))
        return {stage: runs.open_stage("tiny", stage) for stage in ("base", "sft")}


def talk(opened, stage="sft", **options):
    return Chat(opened[stage], ChatConfig(**{"max_new_tokens": 8, **options}))


@pytest.fixture
def terminal(tiny, monkeypatch, capsys):
    """Types lines into the command, then ends the input; returns what was shown."""

    def run(*lines, words=()):
        typed = iter(lines)

        def read(prompt):
            print(prompt, end="")
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        assert main(["--run=tiny", "--max-new-tokens=5", *words]) == 0
        return capsys.readouterr().out

    return run


def test_characters_spread_over_tokens_come_whole():
    tokenizer = Tokenizer.train(["aa bb"] * 3, 266)
    text = "naïve 東京 🙂!"
    single = {tokenizer.decode_bytes([i]): i for i in range(256)}
    tokens = [single[bytes([b])] for b in text.encode()]
    assert list(stream_text(tokens, tokenizer)) == list(text)
    assert list(stream_text(tokens[:-3], tokenizer))[-1] == "\ufffd"  # a cut emoji
    wrong = [single[b"\xff"], single[b"a"]]
    assert "".join(stream_text(wrong, tokenizer)) == "\ufffda"


def test_pieces_are_given_as_they_are_made_and_a_closed_answer_counts_as_said(opened, monkeypatch):
    made = []
    real = engine.generate

    def counting(*args, **kwargs):
        for token in real(*args, **kwargs):
            made.append(token)
            yield token

    monkeypatch.setattr(engine, "generate", counting)
    chat = talk(opened, temperature=1.0)
    pieces = chat.reply("hello")
    said = next(pieces)
    first = len(made)
    said += next(pieces)
    assert 0 < first < len(made) <= first + 4
    pieces.close()
    assert chat.messages[1]["content"] == said


def test_the_conversation_is_remembered_seen_and_cleared(opened, monkeypatch):
    chat, tokenizer, prompts = talk(opened), opened["sft"].tokenizer, []
    real = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda model, ids, *a: prompts.append(ids) or real(model, ids, *a)
    )
    said = ["".join(chat.reply(text)) for text in ("one", "two")]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in chat.messages] == ["one", said[0], "two", said[1]]
    assert prompts[1] == tokenizer.render_for_completion({"messages": chat.messages})
    chat.clear()
    assert chat.messages == []
    assert "".join(chat.reply("one")) == said[0]  # with the same seed


def test_seeds_and_temperature(opened):
    def once(**options):
        return "".join(talk(opened, max_new_tokens=20, **options).reply("hello there"))

    assert once(seed=1, temperature=1.0) == once(seed=1, temperature=1.0)
    assert len({once(seed=s, temperature=1.5, top_k=0) for s in range(5)}) > 1
    o = opened["sft"]
    best = engine.answer(o.model, o.tokenizer, "hello there", max_tokens=20)
    assert {once(seed=s, temperature=0.0) for s in range(3)} == {best}


def test_the_oldest_turns_are_dropped_and_it_is_said_once(opened, terminal):
    texts = [f"message number {i} of the talk" for i in range(8)]
    shown = terminal(*texts)
    assert shown.count("the context is full") == 1
    chat = talk(opened)
    for text in texts:
        list(chat.reply(text))
    kept = [m["content"] for m in chat.messages if m["role"] == "user"]
    assert kept == texts[-len(kept) :] and 1 <= len(kept) < 8
    assert chat.forgotten and chat.messages[0]["role"] == "user"


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_message_that_does_not_fit_changes_nothing(opened, stage):
    chat = talk(opened, stage)
    list(chat.reply("hello"))
    before = list(chat.messages)
    with pytest.raises(PromptTooLong, match="this message has .* shorten it"):
        list(chat.reply("word " * 80))
    assert chat.messages == before


def test_a_base_model_continues_text(opened):
    chat = talk(opened, "base", temperature=0.0)
    o = opened["base"]
    ids = [o.tokenizer.bos, *o.tokenizer.encode("Return the")]
    stop = o.tokenizer.special_tokens.values()
    expected = o.tokenizer.decode(engine.generate(o.model, ids, 8, 0.0, stop_tokens=stop))
    assert "".join(chat.reply("Return the")) == expected and chat.messages == []


def test_a_conversation_in_the_terminal(terminal):
    text = terminal("hello", "", "/clear", "/help", "word " * 80, "again", "/quit", "never")
    assert text.startswith("tiny/sft step 200 on CPU")
    assert text.count("model> ") == 3 and "forgotten" in text and "there is no /help" in text
    assert "shorten it" in text and "base model" not in text and text.count("you> ") == 7
    assert "not fine-tuned" in terminal("/quit", words=["--stage=base"])


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal, monkeypatch):
    def interrupted(model, prompt, *options):
        yield prompt[-2]
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    text = terminal("hello", KeyboardInterrupt(), "more", "/quit")
    assert text.count("(stopped)") == 2 and "(/quit leaves)" in text


def test_one_prompt(tiny, opened, capsys):
    words = ["--run=tiny", "--prompt=What is 12 + 7?", "--temperature=0", "--max-new-tokens=12"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    o = opened["sft"]
    assert out == engine.answer(o.model, o.tokenizer, "What is 12 + 7?", 12) + "\n"
    assert err == ""
    assert main([*words, "--stage=base"]) == 0
    assert "not fine-tuned" in capsys.readouterr().err
    assert main(["--run=tiny", f"--prompt={'word ' * 80}"]) == 2


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--run=none"], "no run 'none'"),
        (["--run=tiny", "--step=3"], "has steps 200, not a checkpoint of step 3"),
        (["--run=tiny", "--model-tag=x"], "has no base-x .it has: base, sft"),
        (["--temperature=-1"], "temperature must not be negative"),
        (["--max-new-tokens=0"], "max_new_tokens must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(tiny, words, phrase, capsys):
    try:
        status = main(words)
    except SystemExit as caught:
        status = caught.code
    assert status == 2 and re.search(phrase, capsys.readouterr().err)


def test_weights_are_converted_for_the_device(tiny):
    low = runs.open_stage("tiny", "sft", dtype=torch.bfloat16)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    assert low.model.cos.dtype == torch.float32
    chat = talk({"sft": dataclasses.replace(low)}, max_new_tokens=4)
    assert isinstance("".join(chat.reply("hello")), str)
