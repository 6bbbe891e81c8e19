"""What to train with a number of FLOPs on a corpus: a table of the shapes that were best of those tried.

The package has a table, shapes.json, and users have one of their own, to which `hotlap sweep --fill-table`
adds rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.locks import lock
from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.train.data.datasets import CLIMBMIX
from hotlap.train.data.shards import shard_paths, shard_tokens
from hotlap.train.data.sources import documents_of, shard_folder

PACKAGED = Path(__file__).with_name("shapes.json")
VERSION = 1  # of the files' format
NEAR = 2.0  # a row with FLOPs and passes within this factor is taken as it is
TOKEN_BYTES = 4  # of text, about, in shards of any tokenizer
CLIMBMIX_BYTES = 250_000_000 * len(CLIMBMIX.files["train"])


@dataclass(frozen=True)
class TrainingShape:
    """What is chosen for a run."""

    depth: int
    context: int
    step_tokens: int
    """Tokens per step."""
    vocab_size: int

    @property
    def model(self) -> GPTConfig:
        return GPTConfig.from_depth(self.depth, self.vocab_size, self.context)

    @property
    def batch_rows(self) -> int:
        return max(1, self.step_tokens // self.context)

    def validate(self) -> TrainingShape:
        """Return self, or raise ValueError naming the first invalid field."""
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int or not 1 <= value < 1 << 40:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.step_tokens < self.context:
            raise ValueError(f"step_tokens={self.step_tokens} must be at least context={self.context}")
        self.model.validate()
        return self

    def __str__(self) -> str:
        layers = "1 layer" if self.depth == 1 else f"{self.depth} layers"
        return (
            f"{layers}, context {self.context:,}, {self.step_tokens:,} tokens a step, "
            f"vocabulary {self.vocab_size:,}"
        )


@dataclass(frozen=True)
class Row:
    """The best of the shapes that were tried with a number of FLOPs on a corpus, and where it is from."""

    shape: TrainingShape
    flops: float
    """That the device does in the run's time, measured as `hotlap speedrun minutes` does."""
    corpus_bytes: float
    """Of training text; of shards, four bytes a token."""
    corpus_tokens: float
    """Of the shape's vocabulary."""
    bpb: float
    """Mean bits per byte of held-out text over the seeds."""
    seeds: int
    seconds: float
    data: str
    device: str
    date: str
    commit: str
    """Of hotlap, with + if files differed from it, or another project's name."""
    tried: tuple[dict, ...]
    """Shapes, and the bits per byte of each seed; null for a run that diverged or could not be made."""

    def __str__(self) -> str:
        return f"{self.bpb:.4f} bits per byte on {self.data}, {self.device}, {self.date}"


def own_table() -> Path:
    """The user's table; it may not exist yet."""
    return files.state_folder() / PACKAGED.name


def read_table(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there. DataError names what is wrong with it."""
    if not path.exists():
        return []
    found = files.read_object(path)
    remedy = "move it away, and fill it again with `hotlap sweep --fill-table`"
    if set(found) != {"version", "rows"} or not isinstance(found["rows"], list):
        raise DataError(f"{path} holds no table of shapes; {remedy}")
    if found["version"] != VERSION:
        raise DataError(f"{path} is a table of version {found['version']}, not {VERSION}; {remedy}")
    rows = []
    for number, fields in enumerate(found["rows"], 1):
        try:
            rows.append(row_of(fields))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, row {number}: {error}; {remedy}") from error
    return rows


def row_of(fields: dict) -> Row:
    """A row of a file. ValueError or TypeError says what is wrong with it."""
    wanted = {field.name for field in dataclasses.fields(Row)}
    if not isinstance(fields, dict) or set(fields) != wanted:
        raise ValueError(f"it must have exactly the fields {', '.join(sorted(wanted))}")
    for name in ("flops", "corpus_bytes", "corpus_tokens", "bpb", "seeds", "seconds"):
        if type(fields[name]) not in (int, float) or not 0 < fields[name] < math.inf:
            raise ValueError(f"{name}={fields[name]!r} must be a positive number")
    shape = TrainingShape(**fields["shape"]).validate()
    return Row(**fields | {"shape": shape, "tried": tuple(fields["tried"])})


def write_table(path: Path, rows: Sequence[Row]) -> None:
    files.write_object(path, {"version": VERSION, "rows": [dataclasses.asdict(row) for row in rows]})


def add_row(path: Path, row: Row) -> None:
    """Add a row to a file, in place of an earlier one of the same device, data and time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as file:
        lock(file, wait=True)
        others = [r for r in read_table(path) if (r.device, r.data, r.seconds) != same_run(row)]
        write_table(path, [*others, row])


def same_run(row: Row) -> tuple[str, str, float]:
    return row.device, row.data, row.seconds


def corpus_bytes(data: str) -> int:
    """Bytes of training text in what `--data` names; of shards, four bytes a token."""
    if data == "climbmix":
        return CLIMBMIX_BYTES
    if folder := shard_folder(data):
        return TOKEN_BYTES * sum(map(shard_tokens, shard_paths(folder, "train")))
    return sum(len(text.encode(errors="surrogatepass")) for text in documents_of("train", data))


def own_rows_and_corpus(data: str) -> tuple[list[Row], int]:
    """The user's rows, and `corpus_bytes`: what can be said before the device is measured."""
    return read_table(own_table()), corpus_bytes(data)


@functools.cache
def flops_per_token(shape: TrainingShape) -> int:
    """By nanochat's formula."""
    return nanochat_flops(meta_model(shape.model))


def token_bytes(vocab_size: int) -> float:
    """Bytes of text in a token, about: a line through 2.53, 3.12, 3.68 and 4.16 of `pydocs`, with 1,024 to
    8,192 tokens.
    """
    return max(1.0, 0.54 * math.log2(vocab_size) - 2.85)


def passes(shape: TrainingShape, flops: float, corpus: float) -> float:
    """How often a run with so many FLOPs reads a corpus of so many bytes; at least 1, as a part of a large
    corpus is as good as all of a smaller one.
    """
    return max(1.0, token_bytes(shape.vocab_size) * flops / flops_per_token(shape) / corpus)


def distance(row: Row, flops: float, corpus: float) -> float:
    """Between a row and a run: the larger factor between their FLOPs, or between their passes, as a log."""
    apart = passes(row.shape, flops, corpus) / passes(row.shape, row.flops, row.corpus_bytes)
    return max(abs(math.log(flops / row.flops)), abs(math.log(apart)))


def best_shape(
    flops: float, corpus: float, own: Sequence[Row] = (), packaged: Sequence[Row] | None = None
) -> tuple[TrainingShape, str]:
    """The shape for a run of this many FLOPs on a corpus of so many bytes, and in words where it is from.

    A row near the run is taken as it is, a user's before the package's. Without one, depth and tokens are
    interpolated over log FLOPs, and rounded down, between the nearest rows with less and with more.
    """
    packaged = read_table(PACKAGED) if packaged is None else packaged

    def far(row: Row) -> float:
        return distance(row, flops, corpus)

    for rows, whose in ((own, "your"), (packaged, "hotlap's")):
        near = min(rows, key=far, default=None)
        if near and far(near) <= math.log(NEAR):
            return near.shape, f"{whose} row with {near}"
    every = [*own, *packaged]
    low = min((row for row in every if row.flops <= flops), key=far, default=None)
    high = min((row for row in every if row.flops > flops), key=far, default=None)
    if not (low and high):
        row = low or high
        return row.shape, f"the nearest row, with {row}"
    return between(low, high, flops), f"interpolated between two rows: {low}; and {high}"


def between(low: Row, high: Row, flops: float) -> TrainingShape:
    """The shape between those of two rows for FLOPs from the first's to the second's."""
    a, b = low.shape, high.shape
    place = math.log(flops / low.flops) / math.log(high.flops / low.flops)
    step_tokens = 1 << int(math.log2(a.step_tokens) + place * math.log2(b.step_tokens / a.step_tokens))
    nearer = a if place < 0.5 else b
    return TrainingShape(
        int(a.depth + place * (b.depth - a.depth)), min(nearer.context, step_tokens), step_tokens,
        nearer.vocab_size,
    )  # fmt: skip
