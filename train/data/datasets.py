"""Public datasets: their repositories on the Hugging Face hub, and their files.

Revisions are pinned, and so are size and sha256 of some files. For the others, the values that the hub states
at the first download are recorded in `hub.json` beside them, and must not change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hotlap.common.download import Content
from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.train.data.shards import read_shard

LARGEST_ROW_GROUP = 1 << 30  # bytes; ClimbMix's hold 1024 documents, a few MB


@dataclass(frozen=True)
class Dataset:
    """A dataset repository, or a part of one, and its files by split: train, validation, test.

    name: of its folder in the cache. check: raises DataError if a file is not in the dataset's format.
    """

    name: str
    repo: str
    revision: str
    files: dict[str, tuple[str, ...]]
    check: Callable[[Path], object]
    pinned: dict[str, Content]

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    def names(self, shards: int) -> list[str]:
        """The files of the validation split, and the first training shards."""
        train = self.files["train"]
        if not 1 <= shards <= len(train):
            raise ValueError(f"shards={shards}, but {self.repo} has 1 to {len(train)} training shards")
        return [*self.files["validation"], *train[:shards]]


def check_parquet(path: Path, columns: tuple[str, ...]) -> None:
    """DataError if the file has none of the columns, or has too large row groups."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            footer = file.metadata
            largest = max(
                (footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0
            )
            found = file.schema_arrow.names
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from error
    if not set(columns) & set(found) or not footer.num_rows:
        needed = " or ".join(f"`{name}`" for name in columns)
        raise DataError(f"{path} has {footer.num_rows} rows of {found}; it needs rows with a column {needed}")
    if largest > LARGEST_ROW_GROUP:
        raise DataError(f"{path} has a row group of {largest:,} bytes; the limit is {LARGEST_ROW_GROUP:,}")


def parts(pattern: str, numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in numbers)


def splits(folder: str, *names: str) -> dict[str, tuple[str, ...]]:
    """Splits of one file each, as the hub names them."""
    return {name: (f"{folder}/{name}-00000-of-00001.parquet",) for name in names}


# FineWeb's 10B sample in GPT-2 tokens: 100M per shard, fewer in the last. Sizes and hashes of two are pinned.
FINEWEB = Dataset(
    name="fineweb",
    repo="kjj0/fineweb10B-gpt2",
    revision="889765ea1f903759787add96995d81171b632d0c",
    files={
        "train": parts("fineweb_train_{:06d}.bin", range(1, 104)),
        "validation": ("fineweb_val_000000.bin",),
    },
    check=partial(read_shard, vocab_size=50257),
    pinned={
        "fineweb_val_000000.bin": Content(
            200_001_024, "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"
        ),
        "fineweb_train_000001.bin": Content(
            200_001_024, "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e"
        ),
    },
)
# ClimbMix, shuffled: 6,543 shards of about 250M characters (100 MB); the last one validates.
CLIMBMIX = Dataset(
    name="climbmix",
    repo="karpathy/climbmix-400b-shuffle",
    revision="915333b4f8b8684f39aeaafea600fea6f43fb703",
    files={"train": parts("shard_{:05d}.parquet", range(6542)), "validation": ("shard_06542.parquet",)},
    check=partial(check_parquet, columns=("text",)),
    pinned={},
)
# SmolTalk, version for small models: 460,341 training conversations in four files (0.92 GB), and 24,229 for
# validation (0.05 GB).
SMOLTALK = Dataset(
    name="smoltalk",
    repo="HuggingFaceTB/smol-smoltalk",
    revision="f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    files={
        "train": parts("data/train-{:05d}-of-00004.parquet", range(4)),
        "validation": ("data/test-00000-of-00001.parquet",),
    },
    check=partial(check_parquet, columns=("messages",)),
    pinned={},
)
# UltraFeedback, binarized: 61,135 training pairs and 2,000 for validation, one file each.
ULTRAFEEDBACK = Dataset(
    name="ultrafeedback",
    repo="HuggingFaceH4/ultrafeedback_binarized",
    revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
    files={
        "train": ("data/train_prefs-00000-of-00001.parquet",),
        "validation": ("data/test_prefs-00000-of-00001.parquet",),
    },
    check=partial(check_parquet, columns=("rejected",)),
    pinned={},
)
# GSM8K: 7,473 and 1,319 word problems of primary school, with solutions (2.7 MB).
GSM8K = Dataset(
    name="gsm8k",
    repo="openai/gsm8k",
    revision="740312add88f781978c0658806c59bc2815b9866",
    files=splits("main", "train", "test"),
    check=partial(check_parquet, columns=("question",)),
    pinned={
        "main/train-00000-of-00001.parquet": Content(
            2_306_545, "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d"
        ),
        "main/test-00000-of-00001.parquet": Content(
            419_088, "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59"
        ),
    },
)
# MBPP, sanitized: 120 problems to train on and 43 to validate on, Python functions with tests (0.1 MB).
MBPP = Dataset(
    name="mbpp",
    repo="google-research-datasets/mbpp",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    files=splits("sanitized", "train", "validation", "test"),
    check=partial(check_parquet, columns=("test_list",)),
    pinned={},
)
# MMLU: 14,042 multiple-choice questions of 57 subjects to test on, 1,531 to validate on, and 99,842 of other
# exams to train on (51 MB), each of which is nested in a column `train`.
MMLU = Dataset(
    name="mmlu",
    repo="cais/mmlu",
    revision="c30699e8356da336a370243923dbaf21066bb9fe",
    files=splits("auxiliary_train", "train") | splits("all", "validation", "test"),
    check=partial(check_parquet, columns=("question", "train")),
    pinned={
        "all/test-00000-of-00001.parquet": Content(
            3_504_718, "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7"
        ),
    },
)
# ARC: 7,787 multiple-choice questions of science exams (2 MB), of which the challenging ones are those that
# two simple methods got wrong.
ARC_EASY = Dataset(
    name="arc-easy",
    repo="allenai/ai2_arc",
    revision="210d026faf9955653af8916fad021475a3f00453",
    files=splits("ARC-Easy", "train", "validation", "test"),
    check=partial(check_parquet, columns=("question",)),
    pinned={},
)
ARC_CHALLENGE = replace(
    ARC_EASY,
    name="arc-challenge",
    files=splits("ARC-Challenge", "train", "validation", "test"),
    pinned={
        "ARC-Challenge/train-00000-of-00001.parquet": Content(
            189_909, "e488c1587ffdcfc8443f916c53488a95cd471c5790e0746c6bfe4cecf20962cb"
        ),
        "ARC-Challenge/validation-00000-of-00001.parquet": Content(
            55_743, "395a5c88d1580d69855fbaee9450270578df1ad5af6259771cd0a42c20e99f05"
        ),
        "ARC-Challenge/test-00000-of-00001.parquet": Content(
            203_808, "62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9"
        ),
    },
)
