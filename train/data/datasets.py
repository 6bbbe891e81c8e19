"""Public datasets of the speedruns: their repositories on the Hugging Face hub, and their files.

Revisions are pinned, and so are size and sha256 of two files. For the others, the values that the hub states
at the first download are recorded in `hub.json` beside them, and must not change afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.train.data.download import Content
from hotlap.train.data.shards import read_shard

LARGEST_ROW_GROUP = 1 << 30  # bytes; ClimbMix's hold 1024 documents, a few MB


@dataclass(frozen=True)
class Dataset:
    """A dataset repository with numbered training shards and one validation shard.

    check: raises DataError if a file is not in the dataset's format.
    """

    repo: str
    revision: str
    train: str
    numbers: range
    validation: str
    check: Callable[[Path], object]
    pinned: dict[str, Content]

    def names(self, shards: int) -> list[str]:
        """The files of the validation shard and the first training shards."""
        if not 1 <= shards <= len(self.numbers):
            raise ValueError(f"shards={shards}, but {self.repo} has 1 to {len(self.numbers)} training shards")
        return [self.validation, *(self.train.format(number) for number in self.numbers[:shards])]


def check_parquet(path: Path, column: str) -> None:
    """DataError if the file lacks the column, or has too large row groups."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            footer = file.metadata
            largest = max(
                (footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0
            )
            columns = file.schema_arrow.names
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from error
    if column not in columns or not footer.num_rows:
        raise DataError(
            f"{path} has {footer.num_rows} rows of {columns}; it needs rows with a column `{column}`"
        )
    if largest > LARGEST_ROW_GROUP:
        raise DataError(f"{path} has a row group of {largest:,} bytes; the limit is {LARGEST_ROW_GROUP:,}")


# FineWeb's 10B sample in GPT-2 tokens: 100M per shard, fewer in the last. Sizes and hashes of two are pinned.
FINEWEB = Dataset(
    repo="kjj0/fineweb10B-gpt2",
    revision="889765ea1f903759787add96995d81171b632d0c",
    train="fineweb_train_{:06d}.bin",
    numbers=range(1, 104),
    validation="fineweb_val_000000.bin",
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
    repo="karpathy/climbmix-400b-shuffle",
    revision="915333b4f8b8684f39aeaafea600fea6f43fb703",
    train="shard_{:05d}.parquet",
    numbers=range(6542),
    validation="shard_06542.parquet",
    check=partial(check_parquet, column="text"),
    pinned={},
)
# SmolTalk, version for small models: 460,341 training conversations in four files (0.92 GB), and 24,229 for
# validation (0.05 GB).
SMOLTALK = Dataset(
    repo="HuggingFaceTB/smol-smoltalk",
    revision="f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    train="data/train-{:05d}-of-00004.parquet",
    numbers=range(4),
    validation="data/test-00000-of-00001.parquet",
    check=partial(check_parquet, column="messages"),
    pinned={},
)
# UltraFeedback, binarized: 61,135 training pairs and 2,000 for validation, one file each.
ULTRAFEEDBACK = Dataset(
    repo="HuggingFaceH4/ultrafeedback_binarized",
    revision="3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
    train="data/train_prefs-{:05d}-of-00001.parquet",
    numbers=range(1),
    validation="data/test_prefs-00000-of-00001.parquet",
    check=partial(check_parquet, column="rejected"),
    pinned={},
)
