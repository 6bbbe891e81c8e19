"""Mixtures: what an entry means, and how often each conversation trains."""

import json
from collections import Counter

import pytest
from helpers.small_runs import conversation
from helpers.talks import named

from hotlap.common.errors import DataError
from hotlap.train.config import SFTConfig
from hotlap.train.data.conversation_rows import conversation_digests, conversation_rows
from hotlap.train.data.mixtures import Part, parts_of


def talks(word: str, count: int) -> list[list[dict]]:
    return [conversation(f"{word} {i}", "yes") for i in range(count)]


def mixed(parts: list[Part], data: list[list[list[dict]]], tokenizer, seed: int = 0, splits=(None,) * 9):
    """How often each conversation is in an epoch, by its digest, and in the validation."""
    found = [c for i, some in enumerate(data) for c in named(some, splits[i], part=i)]
    rows = conversation_rows(found, tokenizer, 64, seed, parts)
    return tuple(Counter(conversation_digests(rows[split])) for split in ("train", "validation"))


def digests_of(data: list[list[dict]], tokenizer) -> set[bytes]:
    rows = conversation_rows(named(data, "train"), tokenizer, 64, 0, [Part("")])["train"]
    return set(conversation_digests(rows))


def test_an_entry_is_a_name_or_path_with_or_without_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:3").write_text("")
    assert parts_of(("smoltalk", "mmlu:3", "~/a.jsonl:0.5")) == [
        Part("smoltalk"),
        Part("mmlu", 3),
        Part("~/a.jsonl", 0.5),
    ]
    assert parts_of(["a:3", "a:3:2", "b:1e-3"]) == [Part("a:3"), Part("a:3", 2), Part("b", 0.001)]
    assert [str(part) for part in parts_of(["a", "b:3.0", "c:0.5"])] == ["a", "b:3", "c:0.5"]


def test_a_string_is_the_only_entry_as_configurations_had_it_before(tmp_path):
    assert parts_of("tasks") == [Part("tasks")]
    assert SFTConfig(data="tasks").validate().data == ("tasks",) == SFTConfig().data


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e300", "1001", "-0"])
def test_a_weight_that_is_no_number_of_passes_is_refused(weight):
    with pytest.raises(
        ValueError, match=f"the weight in the data 'mmlu:{weight}' must be above 0, and at most"
    ):
        SFTConfig(data=("tasks", f"mmlu:{weight}")).validate()


@pytest.mark.parametrize("entry", ["mmlu:", "mmlu:three", "C:\\talks.jsonl", "a.jsonl:2:"])
def test_what_is_no_weight_and_no_file_is_refused(entry):
    with pytest.raises(ValueError, match=r"is no file, and .* is no weight; write NAME:WEIGHT"):
        SFTConfig(data=(entry,)).validate()
    with pytest.raises(ValueError, match="no data is named"):
        SFTConfig(data=()).validate()


def test_a_weight_is_the_number_of_passes_and_validation_has_everything_once(tiny_tokenizer):
    data = [talks("once", 200), talks("four times", 200), talks("rarely", 200)]
    train, validation = mixed([Part("a"), Part("b", 4), Part("c", 0.5)], data, tiny_tokenizer)
    once, four, rarely = (digests_of(some, tiny_tokenizer) for some in data)
    assert {train[d] for d in once if d not in validation} == {1}
    assert {train[d] for d in four if d not in validation} == {4}
    assert {train[d] for d in rarely if d not in validation} == {0, 1}
    assert 60 < sum(train[d] for d in rarely) < 130
    assert set(validation.values()) == {1} and not set(train) & set(validation)
    assert all(set(validation) & some for some in (once, four, rarely))
    alone = mixed([Part("a"), Part("b"), Part("c")], data, tiny_tokenizer)[1]
    assert alone == validation  # whatever the weights


def test_of_a_part_of_a_pass_the_seed_and_the_text_decide(tiny_tokenizer):
    data = talks("some", 300)
    parts = [Part("a", 2.5)]
    train, validation = mixed(parts, [data], tiny_tokenizer)
    assert set(train.values()) == {2, 3} and 2.3 < train.total() / len(train) < 2.7
    assert mixed(parts, [data[::-1]], tiny_tokenizer) == (train, validation)
    other, same = mixed(parts, [data], tiny_tokenizer, seed=1)
    assert other != train and same == validation
    more = mixed([Part("b"), parts[0]], [talks("more", 50), data], tiny_tokenizer)[0]
    assert {d: n for d, n in more.items() if d in train} == train


@pytest.mark.parametrize("own", ["validation", None])
def test_a_small_part_beside_data_that_validates_is_trained_on(own, tiny_tokenizer):
    for i in range(40):  # whatever its hash is
        few = talks(f"few {i}", 1)
        beside = [talks("many", 60), few, talks("others", 3)]
        train, validation = mixed(
            [Part("many"), Part("few", 2), Part("others")],
            beside,
            tiny_tokenizer,
            splits=("train", None, own),
        )
        (digest,) = digests_of(few, tiny_tokenizer)
        if own:
            assert train[digest] == 2 and digest not in validation
        else:  # one of those that are split by their text has to validate
            assert set(validation) <= digests_of(few + beside[2], tiny_tokenizer) and len(validation) == 1


def test_weights_that_take_nothing_are_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match=r"the weights take none of 3 conversations; raise a:0\.001"):
        mixed([Part("a", 0.001)], [talks("few", 4)], tiny_tokenizer)


def test_repeats_take_no_memory_for_tokens(tiny_tokenizer):
    rows = conversation_rows(named(talks("a", 50)), tiny_tokenizer, 64, 0, [Part("a", 100)])["train"]
    (documents,) = (shard() for shard in rows.shards)
    assert len(documents.starts) > 4000 and len(documents.tokens) < 50 * 64


@pytest.mark.parametrize("first", ["train", None])
@pytest.mark.parametrize("second", ["validation", None])
@pytest.mark.parametrize("reverse", [False, True])
def test_copies_of_a_conversation_that_validates_do_not_train_whichever_set_they_are_of(
    first, second, reverse, tiny_tokenizer, caplog
):
    caplog.set_level("INFO")
    whole, own = talks("some", 100), (first, second)
    data, parts, order = [whole, whole[:5]], [Part("whole", 2), Part("few", 2)], [1, 0] if reverse else [0, 1]
    train, validation = mixed(parts, [data[i] for i in order], tiny_tokenizer, splits=[own[i] for i in order])
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == digests_of(whole, tiny_tokenizer)
    if own == ("train", "validation"):
        assert set(validation) == digests_of(whole[:5], tiny_tokenizer) and set(train.values()) == {2}
        assert "left out: 5 copies of conversations that validate" in caplog.text
    if own == (None, None):  # all copies are on one side anyway
        assert "left out" not in caplog.text


def test_the_log_says_what_each_part_brings_and_its_share(tiny_tokenizer, caplog):
    caplog.set_level("INFO")
    train, validation = mixed([Part("a"), Part("b", 3)], [talks("x", 100), talks("y", 100)], tiny_tokenizer)
    lines = [line for line in caplog.messages if "tokens an epoch" in line]
    assert [line.partition(":")[0] for line in lines] == ["a", "b"] and "b:3: " in lines[1]
    counts = [int(line.split(": ", 1)[1].split()[0]) for line in lines]
    validating = [int(line.split("; ")[1].split()[0]) for line in lines]
    assert sum(counts) == len(train) and sum(validating) == len(validation)
    shares = [int(line.split("(")[1].split()[0]) for line in lines]
    assert shares[1] == pytest.approx(75, abs=3) and sum(shares) == 100


def test_a_run_of_a_mixture_says_so_in_its_configuration(tmp_path):
    from hotlap.common.options import parse, to_json

    (tmp_path / "a.toml").write_text('data = "tasks"\n')
    (tmp_path / "b.toml").write_text('data = ["tasks", "mmlu:3"]\n')
    for name, data in (("a", ["tasks"]), ("b", ["tasks", "mmlu:3"])):
        config = parse(SFTConfig, ["--config", str(tmp_path / f"{name}.toml")], command="sft").validate()
        assert json.loads(to_json(config))["data"] == data
    config = parse(SFTConfig, ["base", "--data", "smoltalk", "gsm8k:4", "--epochs", "1"], command="sft")
    assert config.data == ("smoltalk", "gsm8k:4") and str(config.base) == "base"
