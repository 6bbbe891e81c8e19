"""Folders of data sets: what trains, what validates, and what is left out."""

import json
import logging

import pytest

from hotlap.common.errors import DataError
from hotlap.train.data.conversations import check_conversations, conversations_of
from hotlap.train.data.mixtures import Part
from hotlap.train.data.preferences import check_pairs, pairs_of
from hotlap.train.data.prompt_files import split_prompts
from hotlap.train.data.record_files import record_files
from hotlap.train.data.sources import documents, split_documents

pyarrow = pytest.importorskip("pyarrow")
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def records(split: str, count: int) -> list[dict]:
    """Rows that hold text, a conversation, a prompt and a pair, all of which name their split."""
    return [
        {"text": f"{split} {i}", "prompt": f"{split} {i}", "chosen": "b", "rejected": "c",
         "messages": [{"role": "user", "content": f"{split} {i}"}, TALK[1]]}
        for i in range(count)
    ]  # fmt: skip


def write(path, split: str, count: int = 3):
    """A file of records in the format that its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records(split, count))
    if path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in records(split, count)))


SPLITS = ("train", "validation", "test")
HUB = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
       "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]  # fmt: skip
SAVED = [f"{split}/data-00000-of-00001.arrow" for split in SPLITS]
LINES = ["my-train.jsonl", "my_dev.jsonl", "evaluation.jsonl"]
EVERY = pytest.mark.parametrize("files", [HUB, SAVED, LINES], ids=["hub", "saved", "lines"])


@pytest.fixture
def folder(tmp_path, files):
    for name in files:
        words = {"dev": "validation", "evaluation": "test"} | {split: split for split in SPLITS}
        write(tmp_path / "set" / name, next(split for word, split in words.items() if word in name))
    (tmp_path / "set" / "README.md").write_text("---\nlicense: mit\n---\nWhat this is.\n")
    (tmp_path / "set" / "load.py").write_text("raise SystemExit\n")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": []}')
    return tmp_path / "set"


@EVERY
def test_files_named_so_train_validate_or_are_left_out_with_a_line(folder, files, caplog):
    with caplog.at_level(logging.INFO, "hotlap"):
        train, held_out = split_documents(str(folder))
    assert {text.split()[0] for text in train} == {"train"}
    assert held_out == ["validation 0", "validation 1", "validation 2"]
    assert sorted(documents(str(folder))) == sorted(train + held_out)
    said = " ".join(caplog.messages)
    count = len(files) - 2
    assert f"{folder}: its own splits: {count} files train, 1 validate" in said
    assert "files of the test split: 1" in said and "a data set's README.md" in said
    assert "files of no split: 1" in said  # load.py


@EVERY
def test_conversations_pairs_and_prompts_have_the_same_splits(folder, files):
    parts = [Part(str(folder), 1.0)]
    check_conversations(parts)
    check_pairs([str(folder)])
    for found in (
        [(talk.split, talk.messages[0]["content"]) for talk in conversations_of(parts, 0)],
        [(pair.split, pair.prompt[0]["content"]) for pair in pairs_of(str(folder))],
        [(s, m[0]["content"]) for s in SPLITS[:2] for _, m, _ in split_prompts(folder, s)],
    ):
        assert {split for split, _ in found} == {"train", "validation"}
        assert all(said.startswith(split) for split, said in found)


def test_without_files_to_validate_the_text_decides(tmp_path):
    write(tmp_path / "data/train_sft-00000-of-00001.parquet", "train", 40)
    write(tmp_path / "data/test_sft-00000-of-00001.parquet", "test")
    train, held_out = split_documents(str(tmp_path))
    assert train and held_out and {text.split()[0] for text in train + held_out} == {"train"}
    assert {talk.split for talk in conversations_of([Part(str(tmp_path), 1.0)], 0)} == {None}
    assert len(split_prompts(tmp_path, "train")) + len(split_prompts(tmp_path, "validation")) == 40


def test_a_data_set_without_split_names_is_read_whole_without_its_description(tmp_path):
    write(tmp_path / "data-00000-of-00001.arrow", "rows")
    write(tmp_path / "cache-0123456789abcdef.arrow", "computed")
    for name in ("README.md", "state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert list(documents(str(tmp_path))) == ["rows 0", "rows 1", "rows 2"]
    assert [path.name for path, _ in record_files(tmp_path)] == ["data-00000-of-00001.arrow"]


def test_files_that_are_missing_are_counted(tmp_path, caplog):
    write(tmp_path / "data/train-00001-of-00003.parquet", "train")
    with caplog.at_level(logging.INFO, "hotlap"):
        assert len(list(documents(str(tmp_path)))) == 3
    assert f"{tmp_path}/data/train: only 1 of its 3 files are there" in caplog.messages


def test_split_names_do_not_matter_in_other_folders_patterns_and_paths(tmp_path):
    for name in ("test_a.py", "training.md", "README.md"):
        (tmp_path / name).write_text(name)
    assert list(documents(str(tmp_path))) == ["README.md", "test_a.py", "training.md"]
    write(tmp_path / "train.jsonl", "train", 1)
    write(tmp_path / "test.jsonl", "test", 1)
    assert list(documents(str(tmp_path))) == ["train 0"]
    assert list(documents(f"{tmp_path}/t*.jsonl")) == ["test 0", "train 0"]
    assert list(documents(str(tmp_path / "test.jsonl"))) == ["test 0"]


def test_a_folder_that_is_no_data_set_is_refused_where_records_are_needed(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="is a folder; name a file in it"):
        record_files(tmp_path)


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = {split: datasets.Dataset.from_list(records(split, 30)) for split in SPLITS}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "set")
    train, held_out = split_documents(str(tmp_path / "set"))
    assert train == [f"train {i}" for i in range(30)] and held_out == [f"validation {i}" for i in range(30)]
    assert len(list(conversations_of([Part(str(tmp_path / "set"), 1.0)], 0))) == 60
