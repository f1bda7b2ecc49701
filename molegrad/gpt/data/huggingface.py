"""The tokenizer in the form that transformers reads: tokenizer.json and tokenizer_config.json.

What: the same ids from the same text as `molegrad.gpt.data.tokenizer`, decoding and chat template
included, through `transformers.AutoTokenizer`. One thing differs: the name of a special token in a
text becomes that token, as transformers does it, where ours leaves it plain text; its tokenizers
take `split_special_tokens=True` for the same.

Why merges have to be found: tiktoken keeps only the rank of each token and merges the neighbours
whose union has the lowest rank. Byte-pair merges in Hugging Face's form say which two were merged,
so every split of a token into two tokens becomes one, in the order of the ranks.
"""

import importlib.util
import json
from pathlib import Path

from molegrad.gpt.data.tokenizer import SPLIT_PATTERN, Tokenizer

END = "<|assistant_end|>"
# As Tokenizer.render_conversation: a system message joins the first message of the user.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set ns.system = message['content'] + '\\n\\n' -%}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '_start|>' + ns.system + message['content']"
    " + '<|' + message['role'] + '_end|>' -}}"
    "{%- set ns.system = '' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"
)


def save_huggingface(tokenizer: Tokenizer, folder: Path, max_length: int) -> list[Path]:
    """Write both files; what was written. Without the package `tokenizers`, which transformers
    brings along, nothing is written and one line says so."""
    if importlib.util.find_spec("tokenizers") is None:
        print(
            "the package tokenizers is not installed (pip install 'molegrad[hf]'): the model is "
            "written without a tokenizer, only its ids are portable"
        )
        return []
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": END,
        "pad_token": "<|bos|>",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    paths = [Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"]
    huggingface_tokenizer(tokenizer).save(str(paths[0]))
    paths[1].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return paths


def huggingface_tokenizer(tokenizer: Tokenizer):
    """`tokenizer` as a `tokenizers.Tokenizer` with the same ids."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    special = tokenizer.special_tokens
    letters = _letters()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(special))]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in tokens:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(ranks[a], ranks[b]) for a, b in splits if a in ranks and b in ranks]
        merges += [(spelt(tokens[a]), spelt(tokens[b])) for a, b in sorted(known)]
    vocab = {spelt(token): rank for token, rank in ranks.items()}
    # tiktoken gives a piece that is a token its rank at once, whether or not merges lead there.
    made = HuggingFaceTokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return made


def _letters() -> list[str]:
    """A printable character for each byte, as GPT-2 has them: bytes that are printable in Latin-1
    stand for themselves, the others in turn for the characters from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
