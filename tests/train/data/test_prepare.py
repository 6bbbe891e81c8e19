"""Public datasets as token shards, by the commands, from a hub on this machine."""

import hashlib
import json

import pytest
from helpers.commands import BAD_DATA, CANNOT_CREATE, INPUT_OUTPUT, USAGE, assert_error

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub")
from helpers.hub_data import TEXTS, add_climbmix, add_fineweb

from hotlap.cli import main
from hotlap.model import tokenizer as tokenizers
from hotlap.model.tokenizer import Tokenizer
from hotlap.train.data import datasets, public
from hotlap.train.data.shards import read_shard, shard_paths, write_shard

CLIMBMIX = datasets.CLIMBMIX


@pytest.fixture
def climbmix(hub_server, tmp_path, monkeypatch):
    """The hub with ClimbMix, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    add_climbmix(hub_server, tmp_path)
    return hub_server


def expected_tokens(name: str, tokenizer: Tokenizer) -> list[int]:
    return [i for text in TEXTS[name] for i in (tokenizer.bos, *tokenizer.encode(text))]


def test_climbmix_becomes_a_tokenizer_and_a_shard_of_tokens_for_each_of_text(climbmix, tmp_path, capsys):
    assert main(["tokenizer", "--source", "climbmix", "--shards", "2", "--vocab-size", "300"]) == 0
    tokenizer = Tokenizer.load("tokenizer.json")
    learnt = tokenizers.train_bpe((t for n in CLIMBMIX.names(2)[1:] for t in TEXTS[n]), 300)
    assert tokenizer.definition == learnt.definition  # from the training shards alone
    assert main(["data", "--source", "climbmix", "--shards", "3"]) == 0
    folder = tmp_path / "data" / "climbmix"
    assert [p.name for p in shard_paths(folder, "train")] == [f"train_{i:06d}.bin" for i in range(3)]
    assert [p.name for p in shard_paths(folder, "validation")] == ["validation_006542.bin"]
    for name in CLIMBMIX.names(3):
        tokens = read_shard(folder / public.token_shard(name), tokenizer.vocab_size)
        assert tokens.tolist() == expected_tokens(name, tokenizer)
    assert (folder / "tokenizer.json").read_text() == tokenizer.definition
    assert climbmix.fetched() == dict.fromkeys(CLIMBMIX.names(3), 1)


def test_climbmix_goes_on_with_what_is_missing_or_damaged(climbmix, tmp_path, tiny_tokenizer, monkeypatch):
    done = []

    def interrupted(path, tokens, vocab_size):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        write_shard(path, tokens, vocab_size)

    monkeypatch.setattr(public, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        public.climbmix(tmp_path / "out", 3, tiny_tokenizer)
    assert done == ["validation_006542.bin", "train_000000.bin"]
    done.clear()
    path = tmp_path / "out" / "train_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    kept = (tmp_path / "out" / "validation_006542.bin").stat().st_mtime_ns
    monkeypatch.setattr(public, "write_shard", write_shard)
    public.climbmix(tmp_path / "out", 3, tiny_tokenizer)
    for name in CLIMBMIX.names(3):
        tokens = read_shard(tmp_path / "out" / public.token_shard(name), tiny_tokenizer.vocab_size)
        assert tokens.tolist() == expected_tokens(name, tiny_tokenizer)
    assert (tmp_path / "out" / "validation_006542.bin").stat().st_mtime_ns == kept


def test_climbmix_that_is_there_needs_neither_network_nor_text(
    climbmix, tmp_path, tiny_tokenizer, monkeypatch
):
    assert public.download_plan("climbmix", tmp_path / "out", 1).missing.keys() == set(CLIMBMIX.names(1))
    public.climbmix(tmp_path / "out", 1, tiny_tokenizer)
    for path in CLIMBMIX.folder.iterdir():
        path.unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    public.climbmix(tmp_path / "out", 1, tiny_tokenizer)
    assert public.download_plan("climbmix", tmp_path / "out", 1).bytes_missing == 0


def test_climbmix_does_not_mix_tokenizers_or_write_among_other_shards(climbmix, tmp_path, capsys):
    for size in ("280", "290"):
        out = f"{size}.json"
        assert (
            main(["tokenizer", "--source", "climbmix", "--shards", "1", "--vocab-size", size, "--out", out])
            == 0
        )
    make = ["data", "--source", "climbmix", "--shards", "1", "--out", "out", "--tokenizer"]
    assert main([*make, "280.json"]) == 0
    capsys.readouterr()
    assert_error(capsys, main([*make, "290.json"]), BAD_DATA, "another tokenizer", "another folder")
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert_error(capsys, main([*make, "290.json"]), CANNOT_CREATE, "has shards and no tokenizer.json")


def test_too_many_shards_and_no_network_are_one_line(climbmix, capsys, monkeypatch):
    make = ["tokenizer", "--source", "climbmix", "--shards"]
    assert_error(capsys, main([*make, "6543"]), USAGE, "--shards 6543", "1 to 6542")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert_error(capsys, main([*make, "1"]), INPUT_OUTPUT, "could not download shard_0", "check the network")


def test_a_tokenizer_learns_from_so_many_characters_at_most(climbmix):
    make = [
        "tokenizer",
        "--source",
        "climbmix",
        "--shards",
        "3",
        "--vocab-size",
        "300",
        "--max-chars",
        "1000",
    ]
    assert main(make) == 0
    text = "".join(TEXTS[CLIMBMIX.names(1)[1]])
    pieces = [t for t in TEXTS[CLIMBMIX.names(1)[1]] if text.index(t) + len(t) <= 1000]
    pieces.append(text[len("".join(pieces)) : 1000])
    assert Tokenizer.load("tokenizer.json").definition == tokenizers.train_bpe(pieces, 300).definition


@pytest.fixture
def fineweb(hub_server, tmp_path, monkeypatch):
    """The hub with FineWeb."""
    monkeypatch.chdir(tmp_path)
    add_fineweb(hub_server, tmp_path, monkeypatch)
    return hub_server


def test_fineweb_is_its_shards_and_gpt2_s_tokenizer(fineweb, tmp_path, monkeypatch):
    assert public.download_plan("fineweb", tmp_path / "data/fineweb", 2).bytes_missing == 3 * (1024 + 40)
    assert main(["data", "--source", "fineweb", "--shards", "2"]) == 0
    folder = tmp_path / "data" / "fineweb"
    assert read_shard(*shard_paths(folder, "validation"), 50257).tolist() == list(range(20))
    assert [int(read_shard(p, 50257)[0]) for p in shard_paths(folder, "train")] == [1, 2]
    assert Tokenizer.load(folder / "tokenizer.json").sha256 == public.gpt2().sha256
    record = json.loads((folder / "hub.json").read_text())["files"]
    for path in folder.glob("*.bin"):
        assert record[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    public.fineweb(folder, 2)  # nothing to do


def test_fineweb_is_not_put_beside_another_tokenizer(fineweb, tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save(tmp_path / "tokenizer.json")
    code = main(["data", "--source", "fineweb", "--shards", "1", "--out", "."])
    assert_error(capsys, code, BAD_DATA, "not GPT-2's tokenizer", "another folder")


def test_data_from_files_needs_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_error(capsys, main(["data", "--source", "texts/*.txt"]), USAGE, "texts/*.txt", "--out")
