"""Datasets of multiple-choice questions and of word problems on the hub."""

import pytest
from helpers.hub_data import add_split

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow.parquet")

from hotlap.common.errors import DataError
from hotlap.train.data import hub
from hotlap.train.data.datasets import ARC_CHALLENGE, ARC_EASY, GSM8K, MMLU


@pytest.mark.parametrize("dataset", [GSM8K, MMLU, ARC_EASY, ARC_CHALLENGE], ids=lambda dataset: dataset.name)
def test_the_splits_of_a_dataset_are_files_of_its_own_in_the_cache(
    hub_server, dataset, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = {"question": "a"}
    for split in dataset.files:
        nested = dataset is MMLU and split == "train"
        add_split(hub_server, monkeypatch, dataset, split, [{"train": row} if nested else row])
        hub.download(dataset, dataset.folder, dataset.files[split])
    files = list(dataset.folder.rglob("*.parquet"))
    assert {str(path.relative_to(dataset.folder)) for path in files} == set(hub_server.fetched())
    assert dataset.folder == tmp_path / "hotlap" / dataset.name
    assert set(dataset.pinned) <= {name for names in dataset.files.values() for name in names}


def test_a_file_that_differs_from_what_is_pinned_is_refused(hub_server, tmp_path):
    (name,) = GSM8K.files["test"]
    hub_server.add(GSM8K, name, b"another file")
    with pytest.raises(
        DataError, match=r"has main/test.* with 12 bytes .*, not 419,088 bytes and sha256 ee7"
    ):
        hub.download(GSM8K, tmp_path, [name])
