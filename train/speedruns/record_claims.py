"""What the numbers in a record must satisfy, without its runs. Each function returns what holds, in words, or
raises DataError with what does not.
"""

from __future__ import annotations

import math

from hotlap.common.errors import DataError
from hotlap.model.config import shape_from
from hotlap.model.flops import causal_flops, meta_model
from hotlap.train.speedruns.corpora import CORPORA
from hotlap.train.speedruns.record_file import FEWEST_RUNS, MINUTES, T_95, content_sha256, statistics_of

LATE = 5.0  # seconds, and two steps: one is begun if the average would end in time, and a busy machine stalls
# A laptop that is too hot, or saves its battery, computes at about half its speed. On two cores shared with
# other programs, eight measurements of the ceiling differed by 3 %.
STEADY = 0.75  # the slowest measured ceiling over the fastest
MOST_LAYERS = 1000  # each takes a moment to count
FP8 = 2  # times the FLOP/s of bfloat16, in which the ceiling is measured


def unchanged(record: dict) -> str:
    """By accident, or by hand: whoever writes a hash of their own is found by the other claims."""
    if content_sha256(record) != record["sha256"]:
        raise DataError("it was edited after it was written: its content has another sha256")
    return "the record is as it was written"


def known_corpus(record: dict) -> str:
    if record["corpus"] not in CORPORA:
        raise DataError(f"unknown corpus {record['corpus']!r}; known: {', '.join(CORPORA)}")
    return f"{record['corpus']} is a corpus of the race"


def several_runs(record: dict) -> str:
    """Seeds, weights, and the statistics."""
    runs = record["runs"]
    if not 1 <= len(runs) <= len(T_95) + 1:
        raise DataError(f"{len(runs)} runs; a record has 1 to {len(T_95) + 1}")
    if [run["seed"] for run in runs] != list(range(len(runs))):
        raise DataError("its seeds are not 0, 1, 2 and so on: a record has every run, not the best of many")
    if len({run["weights_sha256"] for run in runs}) < len(runs):
        raise DataError("two of its runs have the same weights")
    if len({run["device"] for run in runs}) > 1:
        raise DataError(f"its runs are of {' and '.join(dict.fromkeys(run['device'] for run in runs))}")
    for name, value in statistics_of([run["bpb"] for run in runs]).items():
        if not close(record[name], value):
            raise DataError(f"{name} is {record[name]}, and that of its runs is {value}")
    return "mean, sigma and interval are those of " + (f"{len(runs)} runs" if len(runs) > 1 else "a run")


def close(found: object, expected: object) -> bool:
    """Equal, but for the last digits, which differ between versions of Python."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, float) and isinstance(found, float | int):
        return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    return found == expected


def fitting_clock(record: dict) -> str:
    """Tokens by the steps, seconds by the minutes, and FLOPs by what the device can do."""
    config, minutes, highest = record["config"], record["minutes"], 0.0
    try:
        shape = shape_from(config["model"])
    except (ValueError, TypeError) as error:
        raise DataError(f"its model cannot be built by this version of hotlap: {error}") from error
    if shape.layers > MOST_LAYERS:
        raise DataError(f"its model has {shape.layers:,} layers; a record has up to {MOST_LAYERS}")
    model = meta_model(shape)
    step, flops = config["batch_rows"] * model.config.context, causal_flops(model)
    for run in record["runs"]:
        name = f"the run with seed {run['seed']}"
        if not 0 < run["tokens"] == run["steps"] * step:
            raise DataError(f"{name} has {run['tokens']:,} tokens, not {run['steps']:,} steps of {step:,}")
        if not 0 < run["seconds"] <= 60 * minutes + LATE + 2 * run["seconds"] / run["steps"]:
            raise DataError(f"{name} trained for {run['seconds']:.1f} s, not at most {minutes:g} minutes")
        ceiling = max(run["before"]["matmul"], run["after"]["matmul"]) * run["ranks"]
        share = run["tokens"] * flops / run["seconds"] / ceiling if ceiling else math.inf
        highest = max(highest, share / (FP8 if config["dtype"] == "fp8" else 1))
        if highest > 1:
            raise DataError(
                f"{name} would need {highest:.2g} times the FLOP/s of a large matmul on its device: its "
                f"clock does not fit its {run['tokens']:,} tokens"
            )
    return f"the clock fits the tokens: at most {highest:.0%} of the device's measured FLOP/s"


def steady_device(record: dict) -> str:
    measured = [run[when]["matmul"] for run in record["runs"] for when in ("before", "after")]
    low, high = min(measured), max(measured)
    if low < STEADY * high:
        raise DataError(
            f"the device's FLOP/s fell to {low / high:.0%} of what they were: it was throttled by heat or "
            "power, or shares its cores or its GPU with another program; run again when it is cool, on "
            "mains power and idle"
        )
    return f"the device kept its speed: {low / 1e12:.3g} to {high / 1e12:.3g} TFLOP/s in a matmul"


CLAIMS = (unchanged, known_corpus, several_runs, fitting_clock, steady_device)


def lacks(minutes: float, runs: int) -> str:
    """What a record of so many runs lacks to be a row of the table; empty if nothing."""
    if minutes != MINUTES:
        return f"a row has runs of {MINUTES:g} minutes, and these are of {minutes:g}"
    if runs < FEWEST_RUNS:
        return f"a row has at least {FEWEST_RUNS} runs, and this is {runs}; give --runs {FEWEST_RUNS}"
    return ""
