"""The figures in docs/ and CONTRIBUTING.md are those of the result files, to the digits that they give."""

import dataclasses
import json
from statistics import mean

import pytest
from helpers.figures import (
    GRAPH,
    H100,
    HALF,
    OWN,
    RESULTS,
    ROOT,
    ZEN4,
    ZEN5,
    beside_nanochat,
    bits,
    ceiling,
    decoding,
    filled,
    minutes,
    multiplier,
    overlap,
    portable,
    race,
    rl_trial,
    serving,
    training,
    words_of,
)

from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.train.presets import gpt2_124m, gpt2_grade
from hotlap.train.speedruns.records import RECORDS, dollars_per_hour, throughput
from hotlap.train.speedruns.shapes import PACKAGED, read_table

SHOWN = ("unknown_refused_of_198", "facts_of_534")

CLAIMS = [  # a document, a text in it with {} for figures, and the figures
    (
        "docs/records.md",
        "`pydocs` {} %, `docs` {} %, `bigbench` {} %, `shakespeare` {} %",
        [overlap(corpus) for corpus in ("pydocs", "docs", "bigbench", "shakespeare")],
    ),
    (
        "CONTRIBUTING.md",
        "matmuls of 2,048 reach {} GFLOP/s, and {} with another program on one of the cores. By the clock, "
        "{} become {}",
        [
            ceiling(case, clock)
            for clock in ("by processor time", "by the clock")
            for case in ("alone", "another program on one of two cores")
        ],
    ),
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
    assert filled(text, figures) in words_of(document)


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
    words = words_of("docs/h100.md")
    assert f"{passes} x {one:.1f} + {optimizer:.1f} ms for 1,048,576 tokens, {hours:.1f} hours" in words


def test_the_records_in_the_document_are_those_of_the_table():
    words = words_of("docs/speedruns.md")
    first, last = (next(t for t in RECORDS if t.name.startswith(name)) for name in ("#1 ", "#89 "))
    run_6 = next(t for t in RECORDS if t.name.startswith("run 6 "))
    assert f"| {last.seconds:.1f} s with {last.tokens / 1e6:.0f}M tokens (#89" in words
    assert f"| {run_6.seconds / 3600:.2f} hours, CORE {run_6.score:.4f} (run 6" in words
    assert f"took {first.seconds / 60:.1f} minutes" in words
    assert f"{first.seconds / last.seconds:.0f} times as long" in words
    assert f"read {first.tokens / last.tokens:.0f} times as much text" in words
    assert f"at {first.tokens_per_second / last.tokens_per_second:.2f} times the tokens/s" in words


def test_trials_on_two_seeds_have_the_means_of_their_result_file():
    rows = json.loads((RESULTS / ZEN4 / "recipe.json").read_text(encoding="utf-8"))["rows"]

    def reached(change: str) -> str:
        seeds = [
            r["validation_bpb"] for r in rows if f"scalar_lr=0.0625{change}, seed " in r.get("changed", "")
        ]
        assert len(seeds) == 2
        return f"{mean(seeds):.3f}"

    words = words_of("docs/speedruns.md")
    assert f"| {reached(' softcap=0')}; {reached(' schedule.warmdown=0.75')} |" in words
    every = ", tables stepped every 4th step"
    assert f"| {reached(every)}; {reached(f'{every}, their decays times 4')} |" in words


def test_the_search_for_a_shape_found_what_the_document_says():
    row = next(row for row in read_table(PACKAGED) if row.data == "pydocs")
    means = {tuple(one["shape"].values()): f"{mean(one['bpb']):.3f}" for one in row.tried}
    layers, context, batch, vocabulary = dataclasses.astuple(row.shape)

    def reached(**other: int) -> str:
        return means[dataclasses.astuple(dataclasses.replace(row.shape, **other))]

    words = words_of("docs/speedruns.md")
    assert f"two seeds, on an AMD EPYC (Zen 4): it tried {'nine' if len(means) == 9 else len(means)}" in words
    assert (
        f"It began with {layers} layers, {batch:,} tokens a step, a context of {context} and a vocabulary of "
        f"{vocabulary:,}, and stayed there, at {reached()} bits per byte. Half the batch reached "
        f"{reached(step_tokens=batch // 2)}, twice the batch {reached(step_tokens=2 * batch)}; one layer "
        f"{reached(depth=1)}, three layers {reached(depth=3)}; a vocabulary of 1,024 "
        f"{reached(vocab_size=1024)}, of 4,096 {reached(vocab_size=4096)}; a context of 256 "
        f"{reached(context=256)}. A context of 1,024 reached {reached(context=1024)}"
    ) in words


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
