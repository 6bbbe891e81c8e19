"""Small public datasets in their real formats, for a hub on this machine."""

import dataclasses
from pathlib import Path

import numpy as np
from helpers.chat_questions import arc, problem
from helpers.hub_server import HubServer

from hotlap.model import tokenizer as tokenizers
from hotlap.train.data import datasets, public
from hotlap.train.data.shards import write_shard

TEXTS = {  # of ClimbMix, some documents of each shard
    name: [f"Document {i} of shard {n}: {i} and {i} is {2 * i}.\n" for i in range(300)]
    for n, name in enumerate(datasets.CLIMBMIX.names(3))
}


def add_climbmix(server: HubServer, folder: Path) -> None:
    """The validation shard and three training shards. Files are made in the folder, which stays as it is."""
    import pyarrow
    from pyarrow import parquet

    for name, texts in TEXTS.items():
        parquet.write_table(pyarrow.table({"text": texts}), folder / "made", row_group_size=128)
        server.add(datasets.CLIMBMIX, name, (folder / "made").read_bytes())
    (folder / "made").unlink()


def add_fineweb(server: HubServer, folder: Path, monkeypatch, tokens: int = 20) -> None:
    """The validation shard and two training shards, in tokens of a small tokenizer in place of GPT-2's."""
    small = tokenizers.train_bpe(["of small things"] * 9, 290)
    monkeypatch.setattr(public, "gpt2", lambda: small)
    monkeypatch.setattr(public, "GPT2_BOS", small.bos)
    monkeypatch.setattr(public, "FINEWEB", dataclasses.replace(datasets.FINEWEB, pinned={}))
    for i, name in enumerate(datasets.FINEWEB.names(2)):
        write_shard(folder / name, np.arange(i, tokens + i) % 256, 50257)
        server.add(datasets.FINEWEB, name, (folder / name).read_bytes())
        (folder / name).unlink()


def smoltalk_conversations(name: str) -> list[list[dict]]:
    """What is in one of SmolTalk's files here: the last of each cannot be learned from."""
    system = {"role": "system", "content": "Be brief."}
    talks = [
        [system] * (i % 3 == 0)
        + [{"role": "user", "content": f"{i} of {name}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(20)
    ]
    return [*talks, talks[0][:2]]


def write_talks(path: Path, conversations: list[list[dict]]) -> Path:
    """A parquet file with SmolTalk's columns."""
    import pyarrow
    from pyarrow import parquet

    message = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
    columns = {
        "messages": pyarrow.array(conversations, pyarrow.list_(message)),
        "source": ["smol-magpie-ultra"] * len(conversations),
    }
    parquet.write_table(pyarrow.table(columns), path, row_group_size=8)
    return path


def add_smoltalk(server: HubServer, folder: Path) -> None:
    """All files of SmolTalk, each with a few conversations. The folder stays as it is."""
    for name in datasets.SMOLTALK.names(4):
        server.add(
            datasets.SMOLTALK,
            name,
            write_talks(folder / "made", smoltalk_conversations(name)).read_bytes(),
        )
    (folder / "made").unlink()


def add_ultrafeedback(server: HubServer, folder: Path) -> None:
    """UltraFeedback's files, with its columns and three pairs each, and one without a rejected answer."""
    import pyarrow
    from pyarrow import parquet

    message = pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())])
    for name, part in zip(datasets.ULTRAFEEDBACK.names(1), ("validation", "train"), strict=True):
        prompts = [f"{i} of {part}?" for i in range(4)]
        sides = {
            side: [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt in prompts
            ]
            for side, answer in (("chosen", "good"), ("rejected", "bad"))
        }
        sides["rejected"][3] = sides["rejected"][3][:1]
        columns = {"prompt": prompts, "prompt_id": prompts} | {
            side: pyarrow.array(talks, pyarrow.list_(message)) for side, talks in sides.items()
        }
        columns["score_chosen"] = [8.0] * 4
        parquet.write_table(pyarrow.table(columns), folder / "made")
        server.add(datasets.ULTRAFEEDBACK, name, (folder / "made").read_bytes())
    (folder / "made").unlink()


def add_split(
    server: HubServer, monkeypatch, dataset: datasets.Dataset, split: str, rows: list[dict]
) -> None:
    """The only file of a split, with these rows, whatever content is pinned for it."""
    import pyarrow
    from pyarrow import parquet

    (name,) = dataset.files[split]
    raw = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), raw)
    server.add(dataset, name, raw.getvalue().to_pybytes())
    monkeypatch.delitem(dataset.pinned, name, raising=False)


def add_questions(server: HubServer, monkeypatch) -> None:
    """ARC's test splits, of 6 questions each, and 20 training questions of GSM8K that its test split has not.
    The other public questions are in `add_conversations`.
    """
    for dataset in (datasets.ARC_EASY, datasets.ARC_CHALLENGE):
        add_split(server, monkeypatch, dataset, "test", [arc(i) for i in range(6)])
    add_split(server, monkeypatch, datasets.GSM8K, "train", [problem(i, 12) for i in range(20)])


def add_conversations(server: HubServer, folder: Path, monkeypatch, count: int = 20) -> None:
    """What `hotlap sft` can download: SmolTalk, and this many rows in each file of MMLU and GSM8K."""
    add_smoltalk(server, folder)
    for split in datasets.MMLU.files:
        rows = [
            {"question": f"{split}: {i} and {i}?", "choices": [f"{2 * i}", "1", "3", "5"], "answer": 0}
            for i in range(count)
        ]
        nested = [{"train": row} for row in rows] if split == "train" else rows
        add_split(server, monkeypatch, datasets.MMLU, split, nested)
    solution = "They are {0}+{0} = <<{0}+{0}={1}>>{1}.\n#### {1}"
    problems = [
        {"question": f"{i} and {i} apples?", "answer": solution.format(i, 2 * i)} for i in range(count)
    ]
    for split in datasets.GSM8K.files:
        add_split(server, monkeypatch, datasets.GSM8K, split, problems)


def mbpp_rows(split: str, count: int = 3) -> list[dict]:
    """Rows with MBPP's columns (sanitized)."""
    return [
        {
            "source_file": "Benchmark Questions Verification V2.ipynb",
            "task_id": i,
            "prompt": f"Write a function to add {i} to a number ({split}).",
            "code": f"def add(x):\n  return x + {i}",
            "test_imports": ["import math"] * (i % 2),
            "test_list": [f"assert add(1) == {1 + i}", f"assert add(2) == {2 + i}"],
        }
        for i in range(count)
    ]


def add_mbpp(server: HubServer, monkeypatch) -> None:
    """MBPP's splits, with a few rows each."""
    for split in datasets.MBPP.files:
        add_split(server, monkeypatch, datasets.MBPP, split, mbpp_rows(split))
