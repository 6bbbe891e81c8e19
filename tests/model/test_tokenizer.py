"""Text to ids and back, and what a tokenizer file may hold."""

import json
import random

import pytest
import tokenizers
from helpers.tools import LINES

from hotlap.common.errors import DataError
from hotlap.model import tokenizer as tokenizer_module
from hotlap.model.streaming import StreamDecoder
from hotlap.model.tokenizer import (
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    encodable_parts,
    from_ranks,
    train_bpe,
    train_characters,
)

ALPHABETS = (
    "abcdefghij ABC 0123456789", " \t\n\r\u00a0\u3000\u200b", "éüñßøåçàèùâêîôû",
    "私は猫が好きです日本語中文字符", "😀🎉👩‍👩‍👧🏽🇩🇪", "'s 't 're <|>_-+*/=()[]{}", "\u0301\u0308\u20e3",
    "اللغةالعربيةहिन्दी", "\x00\x01\x1b\x7f",
)  # fmt: skip


def random_texts(count: int, pieces=ALPHABETS, seed: int = 0) -> list[str]:
    dice = random.Random(seed)
    return [
        "".join(
            "".join(dice.choices(dice.choice(pieces), k=dice.randint(1, 8)))
            for _ in range(dice.randint(0, 12))
        )
        for _ in range(count)
    ]


def test_any_text_comes_back(tiny_tokenizer):
    dice = random.Random(1)
    anything = [
        "".join(chr(c) for c in dice.choices(range(0x110000), k=30) if not 0xD800 <= c < 0xE000)
        for _ in range(200)
    ]
    texts = [*random_texts(300), *anything, *LINES, ""]
    for text, ids in zip(texts, tiny_tokenizer.encode_batch(texts), strict=True):
        assert tiny_tokenizer.decode(ids) == text and tiny_tokenizer.encode(text) == ids


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, GPT2_PATTERN])
def test_long_text_is_encoded_in_parts_to_the_same_ids(monkeypatch, pattern):
    small = train_bpe(LINES * 20, 320)
    tokenizer = from_ranks({small.token_bytes(i): i for i in range(small.text_size)}, pattern)
    texts = ["".join(random_texts(100, seed=i)) for i in range(20)] + [" ".join(LINES), "\n\n".join(LINES)]
    whole = tokenizer.encode_batch(texts)
    for length in (100, 301, 1000):
        monkeypatch.setattr(tokenizer_module, "LONGEST_PART", length)
        assert all(len(part) <= length for text in texts for part in encodable_parts(text))
        assert tokenizer.encode_batch(texts) == whole == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("run", [" ", "a", "\u3000"])
def test_a_million_times_the_same_character_comes_back(tiny_tokenizer, run):
    text = f"columns{run * 1_100_000}far apart"
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    if run == " ":
        assert tiny_tokenizer.encode_batch(["a", text]) == [tiny_tokenizer.encode("a"), ids]


def test_text_never_becomes_a_special_token(tiny_tokenizer):
    everything = "".join(SPECIAL_TOKENS) + "<|endoftext|>"
    for text in [*random_texts(200, ([*SPECIAL_TOKENS, "a", " ", "<|"],)), everything, *SPECIAL_TOKENS]:
        ids = tiny_tokenizer.encode(text)
        assert max(ids, default=0) < tiny_tokenizer.text_size
        assert tiny_tokenizer.decode(ids) == text


def test_ids_are_those_of_the_file_in_hugging_faces_library(tiny_tokenizer):
    other = tokenizers.Tokenizer.from_str(tiny_tokenizer.definition)
    for text in [*random_texts(300), *LINES]:
        assert tiny_tokenizer.encode(text) == other.encode(text).ids
        assert other.decode(tiny_tokenizer.encode(text)) == text
    assert {other.id_to_token(i) for i in range(289, 300)} == set(SPECIAL_TOKENS)


def test_ids_are_all_used_and_special_ones_come_last(tiny_tokenizer):
    t = tiny_tokenizer
    assert (t.text_size, t.vocab_size) == (289, 300)
    assert sorted(t.special.values()) == list(range(289, 300)) and t.bos == t.special["<|bos|>"]
    assert len({t.token_bytes(i) for i in range(289)}) == 289
    assert t.byte_counts()[289:] == [0] * 11 and min(t.byte_counts()[:289]) == 1
    assert t.decode([t.bos, *t.encode("hi"), t.special["<|user_end|>"]]) == "hi"


def test_bytes_per_text_add_up(tiny_tokenizer):
    counts = tiny_tokenizer.byte_counts()
    for text in random_texts(50):
        assert sum(counts[i] for i in tiny_tokenizer.encode(text)) == len(text.encode())


def test_a_stream_never_shows_half_a_character(tiny_tokenizer):
    for text in random_texts(200):
        decoder = StreamDecoder(tiny_tokenizer)
        pieces = [decoder.push(token) for token in tiny_tokenizer.encode(text)]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + decoder.finish() == text
    emoji = tiny_tokenizer.encode("😀")
    decoder = StreamDecoder(tiny_tokenizer)
    assert len(emoji) == 4 and [decoder.push(t) for t in emoji] == ["", "", "", "😀"]
    assert [decoder.push(t) for t in emoji[:2]] == ["", ""] and decoder.finish() == "\ufffd"


def test_a_stream_of_any_ids_is_what_decode_says(tiny_tokenizer):
    dice = random.Random(0)
    for _ in range(300):
        ids = dice.choices(range(300), k=20)
        decoder = StreamDecoder(tiny_tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == tiny_tokenizer.decode(ids)


def test_a_character_tokenizer_has_an_id_for_each_character(tmp_path):
    text = "héllo wörld 😀\n<|bos|>"
    tokenizer = train_characters(text)
    assert tokenizer.text_size == len(set(text)) and len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("<|bos|>")) < tokenizer.text_size
    with pytest.raises(DataError, match=r"'z' is not among the 16"):
        tokenizer.encode("zoo")
    with pytest.raises(DataError, match="empty"):
        train_characters("")
    tokenizer.save(tmp_path / "t.json")
    assert Tokenizer.load(tmp_path / "t.json").encode_batch([text, "h"]) == tokenizer.encode_batch(
        [text, "h"]
    )
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert other.encode("héllo").ids == tokenizer.encode("héllo")


def test_merges_are_recovered_from_ranks():
    trained = train_bpe(LINES * 20, 400)
    ranks = {trained.token_bytes(i): i for i in range(trained.text_size)}
    assert from_ranks(ranks, SPLIT_PATTERN).definition == trained.definition


def test_a_vocabulary_that_is_too_small_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match=r"vocab_size=266 is less than 267"):
        train_bpe(LINES, 266)
    assert len(train_bpe(LINES, 267).encode("dog")) == 3  # room for bytes, and none for merges
    assert train_bpe(["ab"], 1000).vocab_size < 1000  # a text without more merges


def test_a_saved_tokenizer_is_the_same_one(tiny_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tiny_tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tiny_tokenizer.sha256
    assert loaded.encode(LINES[3]) == tiny_tokenizer.encode(LINES[3])
    json.loads(path.read_text(encoding="utf-8"))  # it is text, and no pickle
    with pytest.raises(FileNotFoundError, match="hotlap tokenizer"):
        Tokenizer.load(tmp_path / "none.json")


def without_a_special_token(fields):
    fields["added_tokens"].pop()


def with_a_hole(fields):
    fields["model"]["vocab"]["a"] = 5000


def without_splits(fields):
    fields["pre_tokenizer"]["pretokenizers"] = []


def with_a_broken_pattern(fields):
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(["


def of_another_model(fields):
    del fields["model"]["vocab"]


def with_a_foreign_character(fields):
    fields["model"]["vocab"]["猫"] = fields["model"]["vocab"].pop("a")


@pytest.mark.parametrize(
    "damage",
    [
        without_a_special_token, with_a_hole, without_splits, with_a_broken_pattern, of_another_model,
        with_a_foreign_character,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_file_that_does_not_fit_is_a_data_error_with_its_path(damage, tiny_tokenizer, tmp_path):
    fields = json.loads(tiny_tokenizer.definition)
    damage(fields)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"\x80\x04K\x01."])
def test_a_file_that_is_no_tokenizer_is_a_data_error(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a hotlap tokenizer\.json"):
        Tokenizer.load(path)
