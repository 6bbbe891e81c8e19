"""Text to token ids and back: byte-level BPE, or single characters.

Trained and stored with Hugging Face `tokenizers` (tokenizer.json), encoded with `tiktoken` from the same
ranks, which gives the same ids several times faster. Special tokens exist only as ids, above every id that
text can produce: no text, whatever it contains, encodes to one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.memory import require_memory

# Llama 3's pre-tokenization: contractions, words with the mark or space before them, numbers of up to three
# digits, punctuation, line ends, spaces. llama.cpp knows it under that name.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|system_start|>", "<|system_end|>",
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|tool_start|>", "<|tool_end|>",
    "<|result_start|>", "<|result_end|>",
)  # fmt: skip
LONGEST_PART = 1 << 18  # characters to encode at once
LAST_WORD = re.compile(r"(?s:.*)[^\W_](?=[\W_])")  # up to the end of a string's last word but one
SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)
BYTES_OF_AN_ID = 57  # reserved by the trainer: an entry of its hash map and one of its list
TOKENIZER = "tokenizer.json"  # in a model's folder


class Tokenizer:
    """Ids 0 to `text_size` - 1 are text; the special tokens follow.

    definition: the content of tokenizer.json. Make one with `train_bpe`, `train_characters`, `load`,
    or `gpt2` of gpt2_tokenizer.py.
    """

    def __init__(self, definition: str):
        self.definition = definition
        fields = json.loads(definition)
        self.special = {token["content"]: token["id"] for token in fields["added_tokens"]}
        if missing := [token for token in SPECIAL_TOKENS if token not in self.special]:
            raise DataError(f"the tokenizer has no {missing[0]}")
        self.bos = self.special["<|bos|>"]
        vocabulary = {t: i for t, i in fields["model"]["vocab"].items() if t not in self.special}
        self.text_size = len(vocabulary)
        self.vocab_size = self.text_size + len(self.special)
        if wrong := [i for i in (*vocabulary.values(), *self.special.values()) if type(i) is not int]:
            raise DataError(f"the tokenizer's id {wrong[0]!r} is not a whole number")
        if sorted(vocabulary.values()) != list(range(self.text_size)):
            raise DataError(f"the tokenizer's {self.text_size} text ids are not 0 to {self.text_size - 1}")
        if sorted(self.special.values()) != list(range(self.text_size, self.vocab_size)):
            raise DataError("the tokenizer's special ids do not follow its text ids")
        if (kind := fields["model"]["type"]) not in ("BPE", "WordLevel"):
            raise DataError(f"the tokenizer's model is {kind!r}; it must be BPE or WordLevel")
        self.is_bpe = kind == "BPE"
        if self.is_bpe:
            byte_of = {character: byte for byte, character in byte_level_alphabet().items()}
            ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items()}
            self._tokens = sorted(ranks, key=ranks.__getitem__)
            pattern = fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            self._encoding = tiktoken.Encoding(
                "hotlap", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            )
        else:
            self._tokens = [c.encode() for c in sorted(vocabulary, key=vocabulary.__getitem__)]
            self._id_of = vocabulary

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json. FileNotFoundError or DataError if it cannot be read."""
        path = Path(path)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder, not a tokenizer; name the {TOKENIZER} in it")
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}; make one with `hotlap tokenizer`")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except DataError as error:
            raise DataError(f"{path} is not a hotlap tokenizer.json: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is not a hotlap tokenizer.json ({error!r})") from error

    def save(self, path: str | Path) -> None:
        files.write(Path(path), self.definition)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of text, always below `text_size`, even if the text spells a special token."""
        if self.is_bpe:
            return [i for part in encodable_parts(text) for i in self._encoding.encode_ordinary(part)]
        try:
            return [self._id_of[character] for character in text]
        except KeyError as error:
            raise DataError(
                f"character {error.args[0]!r} is not among the {self.text_size} of this tokenizer"
            ) from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if not self.is_bpe:
            return [self.encode(text) for text in texts]
        parts = [encodable_parts(text) for text in texts]
        ids = iter(self._encoding.encode_ordinary_batch(list(chain(*parts))))
        return [list(chain(*islice(ids, len(of_one_text)))) for of_one_text in parts]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; empty for a special token."""
        return self._tokens[token] if token < self.text_size else b""

    def byte_counts(self) -> list[int]:
        """Number of bytes of each id, 0 for special tokens: the denominator of bits per byte."""
        return [len(self.token_bytes(token)) for token in range(self.vocab_size)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Special tokens are dropped, and invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


def encodable_parts(text: str) -> list[str]:
    """Text in parts of at most LONGEST_PART characters: tiktoken panics at a million spaces in a row.

    A part ends with a letter or digit that is followed by neither. The split patterns always split there,
    whatever follows, so the ids are those of the whole text. Only text without such a place has others.
    """
    parts, start = [], 0
    while len(text) - start > LONGEST_PART:
        last_word = LAST_WORD.match(text, start, start + LONGEST_PART)
        end = last_word.end() if last_word else start + LONGEST_PART
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:] if start else text]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with `vocab_size` ids, special tokens included; fewer if the text runs out of
    merges.
    """
    check_bpe_size(vocab_size)
    tokenizer = byte_level(models.BPE(), SPLIT_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return finish(tokenizer)


def check_bpe_size(vocab_size: int) -> None:
    """Raise ValueError for a number of ids that a byte-level BPE cannot have. The trainer reserves memory for
    all of them, and would end the process if there is not enough.
    """
    if vocab_size < SMALLEST_BPE:
        raise ValueError(
            f"vocab_size={vocab_size} is less than {SMALLEST_BPE} (256 bytes + {len(SPECIAL_TOKENS)} special)"
        )
    require_memory(f"vocab_size={vocab_size}", BYTES_OF_AN_ID * vocab_size, "lower it")


def train_characters(text: str) -> Tokenizer:
    """A tokenizer with one id per distinct character of text."""
    characters = sorted(set(text))
    if not characters:
        raise DataError("the text is empty; a character tokenizer needs at least one character")
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=characters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return finish(tokenizer)


def from_ranks(ranks: dict[bytes, int], pattern: str, special: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """A byte-level BPE from tiktoken's ranks. Merges are recovered by splitting each token with the lower
    ranks.
    """
    character_of = byte_level_alphabet()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:  # the last merge that builds the token joins the two parts that remain
                best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            merges.append(tuple("".join(character_of[b] for b in part) for part in parts))
    vocabulary = {"".join(character_of[b] for b in token): rank for token, rank in ranks.items()}
    return finish(byte_level(models.BPE(vocabulary, merges), pattern), special)


def byte_level(model: models.BPE, pattern: str) -> tokenizers.Tokenizer:
    """A tokenizer that splits text by the pattern, then works on bytes."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def finish(tokenizer: tokenizers.Tokenizer, special: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """Append the special tokens, and return a Tokenizer."""
    tokenizer.add_special_tokens(list(special))
    return Tokenizer(tokenizer.to_str())


def parsed(definition: str) -> tokenizers.Tokenizer:
    """The content of a tokenizer.json as a tokenizer of the library, which reads more of it than ours does.
    DataError says what it cannot read.
    """
    try:
        return tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # they have no class of their own
        raise DataError(f"the library tokenizers cannot read the tokenizer: {error}") from error


def byte_level_alphabet() -> dict[int, str]:
    """The printable character of each byte in tokenizer.json, by GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
