"""The figures in the documents are those of the result files that they name, to the digits that they give."""

# ruff: noqa: RUF001  the documents have a multiplication sign
import json
from pathlib import Path

import pytest

from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.train.presets import gpt2_124m, gpt2_grade
from hotlap.train.speedruns.records import RECORDS, dollars_per_hour, throughput

ROOT = Path(__file__).parents[1]
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


def multiplier(change: str, *fields: str, file: str = "compare") -> list[tuple]:
    """Values with their intervals."""
    ends = [f"{field}{end}" for field in fields for end in ("", "_low", "_high")]
    return [(f"{ZEN4}/{file}.json", "all depths", change, field, ".2f") for field in ends]


SHOWN = ("unknown_refused_of_198", "facts_of_534")
LONG, DOCUMENTS = "long_attention {} d24 2x8192x12x128", "document_attention both d24 8x2048x12x128"
MLP, HEAD = "linear_relu2 both d24 16384x1536x6144", "linear_cross_entropy both d24 16384x1536x32768"
MUON, FP8 = "muon forward d24 24x1536x6144", "linear_fp8 both d24 16384x1536x6144"


def serving(what: str, field: str = "tokens_per_second", form: str = ",.0f") -> tuple:
    tokens = "16 + 16" if what.startswith("requests") else "64 + 64"
    return (f"{XEON}/serving.json", f"tiny-sft {tokens} tokens {what}", "server", field, form)


def beside_nanochat(batch: int) -> tuple:
    case = f"tiny prompt 128 batch {batch}"
    return (f"{XEON}/inference.json", case, "hotlap", "times_as_fast_as_peer", ".2f")


CLAIMS = [  # a document, a text in it with {} for figures, and the figures
    (
        "docs/interop.md",
        "reaches {} bits per byte in 250 steps, `tiny-portable` {} in as many steps, and {} in as much time",
        [portable("full recipe"), portable("portable, as many steps"), portable("portable, as much time")],
    ),
    *(
        ("docs/speedruns.md", text, multiplier(change, "compute", "time", "tenfold"))
        for text, change in (
            ("to hurt | {} ({} to {}) | {} ({} to {}) | x {} ({} to {})", "schedule.warmdown=0.0"),
            ("to help | {} ({} to {}) | {} ({} to {}) | x {} ({} to {})", "model.value_embeddings=true"),
            (
                "the rounding | {} ({} to {}): no difference found | {} ({} to {}) | x {} ({} to {})",
                "model.qk_gain=1.201",
            ),
        )
    ),
    *(
        ("docs/speedruns.md", text, multiplier(change, "compute", "time", file="bigrams"))
        for text, change in (
            (
                "16,384 rows need {} ({} to {}) of the compute and {} ({} to {}) of the time",
                "model.bigram_rows=16384",
            ),
            ("65,536 rows {} ({} to {}) and {} ({} to {})", "model.bigram_rows=65536"),
        )
    ),
    ("README.md", "tests a chat model in {} s", [demo("seconds")]),
    (
        "README.md",
        "the demo took {} s after installation. The model answered {} of 534 questions about Python in "
        "phrasings it was not trained on, {} of 200 new sums (it calls a calculator), and spelled {} of 100 "
        "new words. It refused {} of 245 questions about anything else, and {} of 854 by mistake",
        [
            demo("seconds"),
            demo("facts_of_534", scale=534),
            demo("sums_of_200", scale=200),
            demo("words_of_100", scale=100),
            demo("refused_of_245", scale=245),
            demo("wrongly_refused_of_854", scale=854),
        ],
    ),
    (
        "README.md",
        "preferred the refusal in {} % of held-out pairs, and refused {} instead of {} of 198 questions "
        "about other unknown names; it answered {} of 534 facts",
        [
            preferences("held_out_pairs", ".1f", 100),
            preferences("unknown_refused_of_198", scale=198),
            preferences("unknown_refused_of_198", scale=198, provider="before"),
            preferences("facts_of_534", scale=534),
        ],
    ),
    (
        "README.md",
        "reached {} bits per byte of held-out text in {} s on two cores of an AMD EPYC (Zen 4)",
        [minutes("validation_bpb", ".3f"), minutes("seconds", ".0f")],
    ),
    (
        "README.md",
        "bigrams and stronger weight decay reached {} in {} s",
        [minutes("validation_bpb", ".3f", "before"), minutes("seconds", ".0f", "before")],
    ),
    *(
        (
            "docs/speedruns.md",
            f"| {text} | {{}} ({{}} to {{}}) | {{}} s |",
            [
                *(minutes(field, ".3f", recipe) for field in ("validation_bpb", "low", "high")),
                minutes("seconds", ".0f", recipe),
            ],
        )
        for text, recipe in (
            ("before: four passes, a vocabulary of 8,192, none of the above", "before"),
            ("now, stopped after as many seconds", "now, in as many seconds"),
            ("now", "now"),
        )
    ),
    (
        "README.md",
        "training step is {} times as fast as nanoGPT's and {} times as fast as nanochat's",
        [peer(XEON, "nanogpt"), peer(XEON, "nanochat")],
    ),
    (
        "README.md",
        "it is {} and {} times as fast",
        [peer(XEON_WITHOUT_AMX, "nanogpt"), peer(XEON_WITHOUT_AMX, "nanochat")],
    ),
    (
        "README.md",
        "forward only | {} TFLOP/s | cuDNN, {} TFLOP/s |",
        [kernel(LONG.format("forward"), name, ".0f", "tflops") for name in ("hotlap", "sdpa")],
    ),
    (
        "README.md",
        "tokens | {} ms (so `auto` uses cuDNN) | cuDNN, {} ms |",
        [kernel(LONG.format("both"), name) for name in ("hotlap", "sdpa")],
    ),
    (
        "README.md",
        "document masks, 8 × 2,048 tokens | {} ms | FlexAttention, {} ms |",
        [kernel(DOCUMENTS, name) for name in ("hotlap", "flex")],
    ),
    (
        "README.md",
        "| linear + ReLU² + linear | {} ms | torch.compile, {} ms |",
        [kernel(MLP, name) for name in ("hotlap", "compile")],
    ),
    (
        "README.md",
        "| output head + cross-entropy | {} ms, {} GB | torch.compile, {} ms, {} GB |",
        [kernel(HEAD, name, ".1f", field) for name in ("hotlap", "compile") for field in ("ms", "memory_gb")],
    ),
    (
        "README.md",
        "| Muon step for 24 matrices | {} ms | torch.compile, {} ms |",
        [kernel(MUON, name, ".1f") for name in ("hotlap", "compile")],
    ),
    (
        "README.md",
        "| linear layer in fp8 | {} ms | torch.compile in bf16, {} ms |",
        [kernel(FP8, name) for name in ("hotlap", "compile")],
    ),
    (
        "README.md",
        "training d24, 131,072 tokens a step | {} tokens/s, {} % MFU |",
        [training("tokens_per_second", "4 digits"), training("mfu_nanochat", ".0f", 100)],
    ),
    (
        "README.md",
        "own commands | {} tokens/s | nanochat, {} tokens/s |",
        [race("hotlap"), race("nanochat")],
    ),
    ("README.md", "no value embeddings, at {} tokens/s", [race("nanoGPT")]),
    (
        "README.md",
        "training d12, own commands | {} | nanochat, {} |",
        [bits("hotlap"), bits("nanochat")],
    ),
    (
        "README.md",
        "with {} bits per byte of held-out text. nanochat's 12 layers reach {} in 60 s, and nanoGPT's 124M "
        "recipe {}",
        [bits("hotlap", HALF), bits("nanochat"), bits("nanoGPT")],
    ),
    (
        "README.md",
        "batch 1, 1,024 tokens before | {} tokens/s | nanochat, {} tokens/s |",
        [decoding(1, GRAPH, "3 digits"), decoding(1, "nanochat", "2 digits")],
    ),
    (
        "README.md",
        "| decoding d24, batch 128 | {} tokens/s | nanochat, {} tokens/s |",
        [decoding(128, GRAPH, "3 digits"), decoding(128, "nanochat", "2 digits")],
    ),
    (
        "README.md",
        "hotlap reached a validation loss of {} in {} s and {} s, nanoGPT {} in {} s and {} s",
        [
            number
            for name, turns in (("hotlap", (1, 2)), ("nanoGPT", (1, 2)))
            for number in (
                characters(1, name, "validation_loss", ".2f"),
                *(characters(turn, name) for turn in turns),
            )
        ],
    ),
    (
        "README.md",
        "16 streams of the demo's model get {} tokens/s, and one gets {}",
        [serving("streams 16"), serving("streams 1")],
    ),
    *(
        (
            "docs/api.md",
            f"| {count} | {{}} | {{}} ms | {{}} ms | {{}} ms |",
            [
                serving(f"streams {count}"),
                serving(f"streams {count}", "ms", ".1f"),
                serving(f"streams {count}", "first_token_ms"),
                serving(f"streams {count}", "first_token_ms_99"),
            ],
        )
        for count in (1, 4, 16)
    ),
    (
        "docs/api.md",
        "memory went from {} MB after the first thousand to {} MB",
        [serving("requests 10000", field) for field in ("memory_mb_after_a_tenth", "memory_mb")],
    ),
    (
        "docs/api.md",
        "is {}, {}, {} and {} times as fast as nanochat's",
        [beside_nanochat(batch) for batch in (1, 8, 32, 128)],
    ),
    (
        "docs/h100.md",
        "takes {} ms at batch 1 ({} tokens/s, 53 % of the bandwidth of a copy), {} ms at batch 8, {} ms at "
        "32",
        [
            decoding(1, GRAPH, ".2f", "ms"),
            decoding(1, GRAPH, "3 digits"),
            *(decoding(batch, GRAPH, ".2f", "ms") for batch in (8, 32)),
        ],
    ),
    (
        "docs/h100.md",
        "takes {} ms now: {} tokens/s and {} % MFU by nanochat's formula. With 4 x 16 rows, which pay for "
        "the optimizer and for casts of weights half as often, it is {} tokens/s and {} % MFU, in {} GB",
        [
            training("ms", ".0f", rows=8),
            *(
                number
                for rows in (8, 16)
                for number in (
                    training("tokens_per_second", "4 digits", rows=rows),
                    training("mfu_nanochat", ".1f", 100, rows),
                )
            ),
            training("memory_gb", ".0f"),
        ],
    ),
    *(
        (
            "docs/h100.md",
            f"| {row} | {{}} | {{}} | {{}} |",
            [race(provider, ".1f", "ms", case), race(provider, digits, case=case), bits(provider, case)],
        )
        for row, provider, case, digits in (
            ("60 | 503", "hotlap", OWN, "3 digits"),
            ("30 | 1,042", "hotlap", HALF, "4 digits"),
            ("60 | 424", "nanochat", OWN, "3 digits"),
            ("58 | 482", "nanoGPT", OWN, "3 digits"),
        )
    ),
    (
        "docs/h100.md",
        "our d12 made {} tokens/s at 65,536 tokens a step",
        [race("hotlap")],
    ),
    (
        "docs/h100.md",
        "against {} at four times that",
        [(f"{H100}/training.json", "d12 4x32x2048", "hotlap", "tokens_per_second", "3 digits")],
    ),
    (
        "README.md",
        "After {} s on one thread of an AMD EPYC (Zen 4), it refused {} instead of {} of 198 questions about "
        "held-out unknown names, and still answered {} of 534 facts",
        (
            rewards("training_seconds"),
            rewards("unknown_refused_of_198", scale=198),
            rewards("unknown_refused_of_198", scale=198, provider="before"),
            rewards("facts_of_534", scale=534),
        ),
    ),
    (
        "docs/rl.md",
        "{} % of unknown names were refused, but facts fell to {} %",
        tuple(rl_trial("names in the phrasings of fine-tuning, 60 steps", name) for name in SHOWN),
    ),
    (
        "docs/rl.md",
        "After 50 steps, {} % were refused and facts were at {} %; after 150, {} % and {} %",
        tuple(
            rl_trial(f"names, after {steps} steps", name) for steps in ("50 of 150", "150") for name in SHOWN
        ),
    ),
    (
        "docs/rl.md",
        "(pass@1 was {} %, pass@8 {} %)",
        tuple(
            rl_trial("spelling, after 50 steps, 64 held-out words", f"held_out_pass_at_{k}") for k in (1, 8)
        ),
    ),
]


@pytest.mark.parametrize(("document", "text", "figures"), CLAIMS, ids=[claim[1][:40] for claim in CLAIMS])
def test_a_document_gives_the_figures_of_its_result_file(document, text, figures):
    words = " ".join((ROOT / document).read_text(encoding="utf-8").split())
    assert text.format(*(figure(*source) for source in figures)) in words


@pytest.mark.parametrize(("name", "recipe"), [("gpt2-124m", gpt2_124m()), ("gpt2-grade", gpt2_grade())])
def test_the_estimates_of_speedruns_are_those_of_their_plans(name, recipe):
    lines = (ROOT / "docs/h100.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{name}`"))
    flops = nanochat_flops(meta_model(recipe.model))
    assert f"| {recipe.tokens / 1e9:.3f}B | {flops / 1e9:.3f} GFLOP |" in row
    for gpus in (1, 8):
        found = throughput("NVIDIA H100 80GB HBM3", gpus, flops)
        hours = recipe.tokens / found.tokens_per_second / 3600
        time = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.1f} minutes"
        cost = dollars_per_hour("NVIDIA H100 80GB HBM3", gpus)[0] * hours
        assert f" {100 * found.mfu:.1f} % MFU, " in row and f" {time}, ${cost:.2f} |" in row


def test_a_step_of_many_passes_takes_what_the_document_calculates():
    rows = json.loads((RESULTS / H100 / "training.json").read_text(encoding="utf-8"))["rows"]
    (step,) = (row for row in rows if row["case"] == "d24 4x16x2048")
    one, optimizer = (step["passes_ms"] + step["data_wait_ms"]) / 4, step["optimizer_ms"]
    recipe = gpt2_grade()
    passes = recipe.batch_rows // 16
    hours = recipe.loop.steps * (passes * one + optimizer) / 3.6e6
    words = " ".join((ROOT / "docs/h100.md").read_text(encoding="utf-8").split())
    assert f"{passes} x {one:.1f} + {optimizer:.1f} ms for 1,048,576 tokens, {hours:.1f} hours" in words


def test_the_records_in_the_document_are_those_of_the_table():
    words = " ".join((ROOT / "docs/speedruns.md").read_text(encoding="utf-8").split())
    first, last = (next(t for t in RECORDS if t.name.startswith(name)) for name in ("#1 ", "#89 "))
    run_6 = next(t for t in RECORDS if t.name.startswith("run 6 "))
    assert f"| {last.seconds:.1f} s with {last.tokens / 1e6:.0f}M tokens (#89" in words
    assert f"| {run_6.seconds / 3600:.2f} hours, CORE {run_6.score:.4f} (run 6" in words
    assert f"took {first.seconds / 60:.1f} minutes" in words
    assert f"{first.seconds / last.seconds:.0f} times as long" in words
    assert f"read {first.tokens / last.tokens:.0f} times as much text" in words
    assert f"at {first.tokens_per_second / last.tokens_per_second:.2f} times the tokens/s" in words


def test_the_table_of_ablations_is_that_of_its_result_file():
    document = (ROOT / "docs/ablations.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / ZEN5 / "ablations.json").read_text(encoding="utf-8"))["rows"]
    for row in rows[1:]:
        change = f"{row['difference']:+.3f} ± {row['difference_error']:.3f}"
        assert f"| {row['provider']} | {row['steps']} | {change} | {row['p']:.2g} |" in document


def test_the_table_of_rewards_is_that_of_its_result_file():
    document = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / ZEN4 / "rl.json").read_text(encoding="utf-8"))["rows"]
    for row in (row for row in rows if row["case"].startswith("base")):
        scores = [name for name in row if "_of_" in name and name != "reward_of_10_steps"]
        shares = " | ".join(f"{100 * row[name]:.1f} %" for name in scores)
        assert f"| {row['case'].removeprefix('base ')} | {row['provider']} | {shares} |" in document


def test_the_table_of_preferences_is_that_of_its_result_file():
    document = (ROOT / "docs/preferences.md").read_text(encoding="utf-8")
    for row in json.loads((RESULTS / ZEN4 / "dpo.json").read_text(encoding="utf-8"))["rows"]:
        shares = " | ".join(f"{100 * row[name]:.1f} %" for name in row if "_of_" in name)
        pairs = f"{100 * row['held_out_pairs']:.1f} %"
        line = f"| {row['case'].removeprefix('base ')} | {row['provider']} | {pairs} | {shares} |"
        assert line in document
