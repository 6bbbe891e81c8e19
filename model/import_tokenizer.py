"""A tokenizer.json of Transformers as a tokenizer of ours: byte-level BPE, with our special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import read_object
from hotlap.common.log import log
from hotlap.model.config import GPT2_BOS
from hotlap.model.gpt2_tokenizer import gpt2
from hotlap.model.tokenizer import (
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    TOKENIZER,
    Tokenizer,
    byte_level_alphabet,
    from_ranks,
    parsed,
)

OURS = {  # of nanochat's, whose calls of Python are expressions, as those of our calculator
    "<|python_start|>": "<|tool_start|>",
    "<|python_end|>": "<|tool_end|>",
    "<|output_start|>": "<|result_start|>",
    "<|output_end|>": "<|result_end|>",
}
VOCABULARY, MERGES, END = "vocab.json", "merges.txt", "<|endoftext|>"
OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def read_tokenizer(folder: Path, config: dict) -> tuple[Tokenizer, list[str]]:
    """The tokenizer, and those of our special tokens that it lacked, which follow its own.

    config: of config.json, whose bos_token_id becomes <|bos|>. A GPT-2 without a tokenizer gets OpenAI's.
    DataError says what cannot be ours.
    """
    path = next((folder / name for name in (TOKENIZER, VOCABULARY) if (folder / name).is_file()), None)
    if path is None:
        if config.get("model_type") != "gpt2":
            raise DataError(f"there is no {TOKENIZER}; a vocabulary in other files cannot be read")
        log.info("%s has no tokenizer, and gets OpenAI's", folder)
        return gpt2(), list(SPECIAL_TOKENS[1:])
    try:
        fields = read_object(path)
        return convert(fields if path.name == TOKENIZER else with_merges(fields, folder), config)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path.name} is not a tokenizer ({error!r})") from error


def with_merges(vocabulary: dict, folder: Path) -> dict:
    """The fields of a tokenizer.json, from the two files that GPT-2 came with: vocab.json, and merges."""
    if not (folder / MERGES).is_file():
        raise DataError(f"there is no {MERGES} beside it")
    if END not in vocabulary:
        raise DataError(f"it has no {END}")
    try:
        first, *lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{MERGES} beside it is not UTF-8 text: {error}") from error
    lines = lines if first.startswith("#version") else [first, *lines]
    return {
        "added_tokens": [{"content": END, "id": vocabulary[END], "special": True}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [line for line in lines if line],
        },
    }


def convert(fields: dict, config: dict) -> tuple[Tokenizer, list[str]]:
    """`read_tokenizer`, of the object in a tokenizer.json."""
    special = special_tokens(fields, config)
    missing = [token for token in SPECIAL_TOKENS if token not in special]
    model = fields["model"]
    if fields.get("normalizer"):
        raise DataError("it normalises text, and ours do not")
    contents = {token["content"] for token in fields["added_tokens"]}
    if contents.issuperset(SPECIAL_TOKENS):  # it is one of ours, but for what Transformers adds
        text = json.dumps(fields | {"post_processor": None, "truncation": None, "padding": None})
        Tokenizer(text)  # says what is wrong
        return Tokenizer(parsed(text).to_str()), []
    if model["type"] != "BPE":
        raise DataError(f"its model is {model['type']!r}; it must be byte-level BPE")
    if found := [name for name in OPTIONS if model.get(name)]:
        raise DataError(f"{found[0]}={model[found[0]]!r} is not supported")
    pattern = split_pattern(fields)
    ranks = ranks_of(model["vocab"], contents)
    tokenizer = from_ranks(ranks, pattern, (*special, *missing))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if merges != json.loads(tokenizer.definition)["model"]["merges"]:
        raise DataError("its merges are not in the order of its ids, by which ours merge")
    return tokenizer, missing


def special_tokens(fields: dict, config: dict) -> list[str]:
    """The special tokens in the order of their ids, by our names where we have them."""
    added = sorted(fields["added_tokens"], key=lambda token: token["id"])
    if plain := [token["content"] for token in added if not token.get("special")]:
        raise DataError(f"{plain[0]!r} is a token that text may spell; ours have none outside of the BPE")
    bos = config.get("bos_token_id", GPT2_BOS if config.get("model_type") == "gpt2" else None)
    names = [OURS.get(token["content"], token["content"]) for token in added]
    if "<|bos|>" not in names:
        names = ["<|bos|>" if token["id"] == bos else name for token, name in zip(added, names, strict=True)]
    first = len(set(fields["model"]["vocab"]) - {token["content"] for token in added})
    if [token["id"] for token in added] != list(range(first, first + len(added))):
        raise DataError(f"its special ids do not follow its {first} text ids, as ours do")
    return names


def split_pattern(fields: dict) -> str:
    """The regular expression that splits text before the BPE."""
    parts = fields["pre_tokenizer"]
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    *before, last = parts
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not before and last.get("use_regex", True):
            return GPT2_PATTERN
        split = before[0] if len(before) == 1 and not last.get("use_regex", True) else {}
        isolated = split.get("behavior") == "Isolated" and not split.get("invert")
        if split.get("type") == "Split" and isolated and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise DataError("it does not split text by one regular expression into bytes, as ours do")


def ranks_of(vocabulary: dict, special: set[str]) -> dict[bytes, int]:
    """The bytes of the text tokens, and their ids."""
    byte_of = {character: byte for byte, character in byte_level_alphabet().items()}
    ranks = {}
    for token, i in vocabulary.items():
        if token not in special:
            if not set(token) <= set(byte_of):
                raise DataError(f"its token {token!r} is not in the alphabet of byte-level BPE")
            ranks[bytes(byte_of[character] for character in token)] = i
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"it has no token for the byte {missing[0]}")
    return ranks
