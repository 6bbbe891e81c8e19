"""Where the figures of the documents come from: result files, and what to take of them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results"
H100 = "nvidia-h100-80gb-hbm3"
XEON = "intel-xeon-family-6-model-207-amx-2-threads"
XEON_WITHOUT_AMX = "intel-xeon-family-6-model-207-amx-limited-to-avx512-core-bf16-2-threads"
ZEN5 = "amd-epyc-zen-5-avx512-bf16-2-threads"
ZEN4 = "amd-epyc-family-25-model-17-avx512-bf16-2-threads"

GRAPH = "hotlap in a graph"
D24 = "d24 prompt 1024 batch"
OWN, HALF = "65,536 tokens a step", "32,768 tokens a step"


def figure(file: str, case: str, provider: str, field: str, form: str, scale: float = 1) -> str:
    """A number of a result file. form: as in format(), or significant digits, such as 4 digits."""
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    (value,) = (row[field] for row in rows if (row["case"], row["provider"]) == (case, provider))
    if form.endswith(" digits"):
        return f"{float(f'{value:.{form.split()[0]}g}'):,.0f}"
    return format(scale * value, form)


def kernel(case: str, provider: str, form: str = ".2f", field: str = "ms") -> tuple:
    return (f"{H100}/kernels.json", case, provider, field, form)


def peer(machine: str, name: str) -> tuple:
    case = f"step tiny 16x256 beside {name}"
    return (f"{machine}/peers.json", case, "hotlap", "times_as_fast_as_peer", ".1f")


def decoding(batch: int, provider: str, form: str, field: str = "tokens_per_second") -> tuple:
    return (f"{H100}/inference.json", f"{D24} {batch}", provider, field, form)


def race(provider: str, form: str = "3 digits", field: str = "tokens_per_second", case: str = OWN) -> tuple:
    return (f"{H100}/race.json", case, provider, field, form)


def bits(provider: str, case: str = OWN) -> tuple:
    return race(provider, ".3f", "validation_bpb", case)


def training(field: str, form: str, scale: float = 1, rows: int = 16) -> tuple:
    return (f"{H100}/training.json", f"d24 4x{rows}x2048", "hotlap", field, form, scale)


def characters(turn: int, provider: str, field: str = "seconds", form: str = ".0f") -> tuple:
    case = f"1,115,394 characters, turn {turn}"
    return (f"{ZEN4}/shakespeare-char.json", case, provider, field, form)


def demo(field: str, form: str = ".0f", scale: float = 1) -> tuple:
    return (f"{ZEN4}/tiny.json", "make demo", "hotlap", field, form, scale)


def preferences(field: str, form: str = ".0f", scale: float = 1, provider: str = "seed 0") -> tuple:
    return (f"{ZEN4}/dpo.json", "base 0", provider, field, form, scale)


def rewards(field: str, form: str = ".0f", scale: float = 1, provider: str = "seed 0") -> tuple:
    return (f"{ZEN4}/rl.json", "base 0", provider, field, form, scale)


def rl_trial(provider: str, field: str) -> tuple:
    return (f"{ZEN4}/rl.json", "trial, base 0", provider, field, ".0f", 100)


def minutes(field: str, form: str, recipe: str = "now") -> tuple:
    return (f"{ZEN4}/recipe.json", "minutes --data pydocs", recipe, field, form)


def portable(provider: str) -> tuple:
    return (f"{ZEN4}/portable.json", "tiny", provider, "validation_bpb", ".3f")


def overlap(corpus: str) -> tuple:
    return (f"{ZEN4}/overlap.json", corpus, "hotlap", "overlap", ".0f", 100)


def ceiling(case: str, clock: str) -> tuple:
    return (f"{ZEN4}/ceilings.json", f"matmuls of 2,048, {case}", clock, "gflops", ".0f")


def multiplier(change: str, *fields: str, file: str = "compare") -> list[tuple]:
    """Values with their intervals."""
    ends = [f"{field}{end}" for field in fields for end in ("", "_low", "_high")]
    return [(f"{ZEN4}/{file}.json", "all depths", change, field, ".2f") for field in ends]


def serving(what: str, field: str = "tokens_per_second", form: str = ",.0f") -> tuple:
    tokens = "16 + 16" if what.startswith("requests") else "64 + 64"
    return (f"{XEON}/serving.json", f"tiny-sft {tokens} tokens {what}", "server", field, form)


def beside_nanochat(batch: int) -> tuple:
    case = f"tiny prompt 128 batch {batch}"
    return (f"{XEON}/inference.json", case, "hotlap", "times_as_fast_as_peer", ".2f")


def filled(text: str, figures: tuple) -> str:
    """A text whose {} are what the result files hold."""
    return text.format(*(figure(*source) for source in figures))


def words_of(document: str) -> str:
    return " ".join((ROOT / document).read_text(encoding="utf-8").split())
