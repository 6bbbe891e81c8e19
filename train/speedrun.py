"""The speedruns that people know, each from the download to the result with its statistics.

The rules are those of their authors; each function says what they ask for. All ranks call it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train import prepare
from hotlap.train.conversations import (
    download_smoltalk,
    read_conversations,
    smoltalk_folder,
    smoltalk_plan,
)
from hotlap.train.dist import World, joined
from hotlap.train.evaluate import EvalConfig, evaluate_model
from hotlap.train.hub import Plan
from hotlap.train.minutes import VOCABULARY, timed, trial_flops
from hotlap.train.plan import Hardware, confirm, plan
from hotlap.train.presets import REFERENCE_BATCH, gpt2_124m, gpt2_grade, gpt2_grade_sft
from hotlap.train.pretrain import MOST_EPOCHS, PretrainConfig, pretrain
from hotlap.train.report import Point, draw_comparison
from hotlap.train.runs import CONFIG
from hotlap.train.sft import fine_tune

SHARD_TOKENS = 100_000_000  # of FineWeb
CLIMBMIX_TOKENS = 50_000_000  # at least, in a shard of 250M characters
TOKENIZER_SHARDS = 8  # of ClimbMix that a tokenizer learns from
TRACK_LOSS = 3.28
TRACK_P = 0.01
GPT2_CORE = 0.256525
Dtype = Literal["auto", "float32", "bfloat16", "fp8"]


@dataclass(frozen=True)
class TrackConfig:
    """Train 124M parameters to a loss of 3.28 on FineWeb, by the rules of modded-nanogpt's main track."""

    out: Path = Path("runs/gpt2-124m")
    """Directory of the runs and their report."""
    data: Path = Path("data/fineweb")
    """Folder of FineWeb's shards in GPT-2's tokens; those that are missing are downloaded."""
    runs: int = 1
    """How many times, each with another seed: the rules want a mean below 3.28 with p < 0.01."""
    micro_batch: str = "auto"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    dtype: Dtype = "auto"
    """What the model computes in."""
    yes: bool = False
    """Do not ask before it starts."""


@dataclass(frozen=True)
class GradeConfig:
    """Train a model as good as GPT-2 (CORE above 0.256525), and teach it to converse: nanochat's speedrun."""

    out: Path = Path("runs/gpt2-grade")
    """Directory of everything that this makes."""
    depth: int = 24
    """Layers; everything else follows from it."""
    data: Path = Path("data/climbmix")
    """Folder of ClimbMix's shards and their tokenizer; what is missing is downloaded and made."""
    talks: str = "smoltalk"
    """Conversations to learn from: smoltalk (which is downloaded) with the tasks, tasks (facts, sums,
    spelling, greetings), or a .jsonl or .parquet file."""
    core_bundle: Path | None = None
    """nanochat's folder eval_bundle; downloaded where none is named."""
    micro_batch: str = "auto"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    fp8: bool = False
    """Large products in fp8."""
    yes: bool = False
    """Do not ask before it starts."""


@dataclass(frozen=True)
class MinutesConfig:
    """The best bits per byte that this device reaches in a fixed time: karpathy/autoresearch's protocol."""

    out: Path = Path("runs/minutes")
    """Directory of the run."""
    minutes: float = 5.0
    """Of training; start-up, compilation and validation are not counted."""
    data: str = "climbmix"
    """climbmix, pydocs, shakespeare, text or .jsonl files, or a folder of shards."""
    dtype: Dtype = "auto"
    """What the model computes in."""
    yes: bool = False
    """Do not ask before it starts."""


def track_speedrun(config: TrackConfig, hardware: Hardware, records: list[Point]) -> dict:
    """The main track of modded-nanogpt, and its result; {} where nobody agreed to the plan.

    Its rules: the tokens of FineWeb's shards as they are; the loss on the first 10,485,760 that validate;
    compiling and warming up before the clock starts, with the state restored; no clock during validations.
    records: what others needed for that loss, for the picture.
    """
    if config.runs < 1:
        raise ValueError(f"runs={config.runs} must be at least 1")
    test = one_sided_test() if config.runs > 1 else None
    recipe = dataclasses.replace(
        gpt2_124m(), data=str(config.data), micro_batch=config.micro_batch, dtype=config.dtype, resume="auto"
    ).validate()
    with joined() as world:
        shards = math.ceil(recipe.tokens / SHARD_TOKENS)
        download = download_words("fineweb", config.data, shards, world)
        title = f"GPT-2 (124M) to a loss of {TRACK_LOSS} on FineWeb"
        if not confirm(title, plan(recipe, world, hardware, download, config.runs), config.yes, world):
            return {}
        with world.leader_first("fineweb"):
            if world.leads:
                prepare.fineweb(config.data, shards)
        folders = [config.out / f"run-{seed}" for seed in range(config.runs)]
        runs = [
            pretrain(dataclasses.replace(recipe, out=folder, seed=seed), warm_up=True)
            for seed, folder in enumerate(folders)
        ]
        result = track_result(runs, test)
        if world.leads:
            draw_comparison(folders, records, "validation_loss", config.out / "curves.png")
            write_result(config.out, title, result)
    return result


def one_sided_test():
    try:
        from scipy.stats import ttest_1samp
    except ImportError as error:
        raise ImportError("the p-value of several runs needs scipy: pip install 'hotlap[stats]'") from error
    return ttest_1samp


def track_result(runs: list[dict[str, float]], test) -> dict:
    """Means over runs, and the p-value of the track's one-sided t-test that the mean loss is below 3.28."""
    losses = [run["validation_loss"] for run in runs]
    p = float(test(losses, TRACK_LOSS, alternative="less").pvalue) if len(runs) > 1 else None
    return {
        "runs": len(runs),
        "losses": losses,
        "mean": statistics.fmean(losses),
        "sigma": statistics.stdev(losses) if len(runs) > 1 else None,
        "p": p,
        "reached": p is not None and p < TRACK_P,
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "tokens": runs[0]["tokens"],
    }


def grade_speedrun(config: GradeConfig, hardware: Hardware, records: list[Point]) -> dict:
    """nanochat's speedrun: tokenizer, pretraining, CORE and bits per byte, conversations; and its scores."""
    recipe = dataclasses.replace(
        gpt2_grade(config.depth), out=config.out / "pretrain", data=str(config.data),
        micro_batch=config.micro_batch, dtype="fp8" if config.fp8 else "auto", resume="auto",
    ).validate()  # fmt: skip
    with joined() as world:
        shards = math.ceil(recipe.tokens / CLIMBMIX_TOKENS)
        if config.talks not in ("tasks", "smoltalk"):
            for _ in read_conversations(Path(config.talks)):  # what is wrong with it shows now
                pass
        download = download_words("climbmix", config.data, shards, world)
        if world.leads and config.talks == "smoltalk":
            download += f"; {plan_words(smoltalk_plan(), smoltalk_folder())}"
        title = f"a model of {config.depth} layers to a CORE of {GPT2_CORE} and into conversation"
        lines = plan(recipe, world, hardware, download)
        lines["length"] += f"; then conversations from {config.talks}, which the time is without"
        if not confirm(title, lines, config.yes, world):
            return {}
        with world.leader_first("climbmix"):
            if world.leads:
                climbmix(config.data, shards, recipe.model.vocab_size)
                if config.talks == "smoltalk":
                    download_smoltalk()
        scores_path = config.out / "scores.json"
        last = pretrain(recipe, warm_up=True)
        if not scores_path.exists():
            tasks = EvalConfig(
                recipe.out, ("bpb", "core"), data=config.data, validation_tokens=recipe.validation_tokens,
                core_bundle=config.core_bundle, out=scores_path,
            )  # fmt: skip
            evaluate_model(tasks)
        read = world.together(lambda: json.loads(scores_path.read_text()) if world.leads else None)
        scores = read[0]["scores"]
        talking = dataclasses.replace(
            gpt2_grade_sft(recipe, config.talks), out=config.out / "sft", micro_batch=config.micro_batch,
            resume="auto",
        )  # fmt: skip
        fine_tune(talking)
        core = scores["core"]["core"]
        result = {
            "core": core, "interval": scores["core"]["interval"], "reached": core > GPT2_CORE,
            "bpb": scores["bpb"]["bpb"], "seconds": last["seconds"], "tokens": last["tokens"],
        }  # fmt: skip
        if world.leads:
            draw_comparison([recipe.out], records, "validation_bpb", config.out / "curves.png")
            write_result(config.out, title, result)
    return result


def minutes_speedrun(config: MinutesConfig, hardware: Hardware, records: list[Point]) -> dict:
    """The best model of a fixed time, and its result.

    The protocol with climbmix: a vocabulary of 8,192, and bits per byte on the first 40 x 524,288 tokens of
    ClimbMix's last shard.
    """
    with joined() as world:
        hub, data = config.data == "climbmix", config.data
        flops = trial_flops(world, config.dtype)
        if hub:
            data = f"data/climbmix-{VOCABULARY}"
        recipe = dataclasses.replace(
            timed(config.out, data, config.minutes, flops), dtype=config.dtype, resume="auto",
            validation_tokens=40 * REFERENCE_BATCH if hub else 0,
        )  # fmt: skip
        recipe = as_begun(recipe).validate()
        tokens = 60 * config.minutes * flops / nanochat_flops(meta_model(recipe.model))
        shards = max(TOKENIZER_SHARDS, math.ceil(tokens / CLIMBMIX_TOKENS))
        download = download_words("climbmix", Path(data), shards, world) if hub else "nothing"
        title = f"the best model of {config.minutes:g} minutes on {config.data}"
        lines = plan(recipe, world, hardware, download)
        lines["length"] += f", about {tokens / 1e6:,.1f}M tokens at the {flops / 1e12:.3g} TFLOP/s measured"
        lines["length"] += f"; but at most {MOST_EPOCHS} times through a corpus of one shard"
        if not confirm(title, lines, config.yes, world):
            return {}
        if hub:
            with world.leader_first("climbmix"):
                if world.leads:
                    climbmix(Path(data), shards, VOCABULARY)
        last = pretrain(recipe)
        result = {
            "bpb": last["validation_bpb"], "depth": recipe.model.layers, "minutes": config.minutes,
            "seconds": last["seconds"], "tokens": last["tokens"], "data": config.data,
        }  # fmt: skip
        if world.leads:
            draw_comparison([config.out], records if hub else [], "validation_bpb", config.out / "curves.png")
            write_result(config.out, title, result)
    return result


def as_begun(recipe: PretrainConfig) -> PretrainConfig:
    """The recipe in the shape that its run has, if it was begun when the device was measured otherwise."""
    path = recipe.out / CONFIG
    if not path.exists():
        return recipe
    saved = json.loads(path.read_text(encoding="utf-8"))
    return dataclasses.replace(
        recipe, model=GPTConfig.from_dict(saved["model"]), batch_rows=saved["batch_rows"]
    )


def climbmix(folder: Path, shards: int, vocab_size: int) -> None:
    """ClimbMix in a folder, with the tokenizer that is there, or one that is learnt first."""
    path = folder / TOKENIZER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        learn = prepare.TokenizerConfig(
            source="climbmix", out=path, vocab_size=vocab_size, shards=TOKENIZER_SHARDS
        )
        prepare.make_tokenizer_file(learn)
    prepare.climbmix(folder, shards, Tokenizer.load(path))


def download_words(source: str, folder: Path, shards: int, world: World) -> str:
    """What will be downloaded for `shards` shards to train on."""
    if not world.leads:
        return ""
    return plan_words(prepare.download_plan(source, folder, shards), folder)


def plan_words(found: Plan, folder: Path) -> str:
    if not found.missing:
        return f"nothing, {folder} has it"
    return f"{len(found.missing)} files, {found.bytes_missing / 1e9:.2f} GB, for {folder}"


def write_result(out: Path, title: str, result: dict) -> None:
    """result.json, and report.md with the same numbers and the picture."""
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {title[0].upper()}{title[1:]}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {shown(value)} |" for name, value in result.items()]
    if (out / "curves.png").exists():
        lines += ["", "![the run beside others](curves.png)"]
    (out / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "n/a"}[value]
    return f"{value:.5g}" if isinstance(value, float) else str(value)
