"""The `hotlap` command. Each subcommand's module is imported when it is called."""

from __future__ import annotations

import contextlib
import os
import sys

from hotlap.model.errors import guarded, known

COMMANDS = {
    "speedrun": "train a model that answers, from nothing: hotlap speedrun tiny",
    "tokenizer": "learn a tokenizer from text",
    "data": "turn text into token shards",
    "pretrain": "train a base model on text",
    "sft": "teach a base model to converse",
    "eval": "score a model: bits per byte, CORE, samples, held-out questions",
    "report": "write a run's report again",
    "sweep": "train variants of a recipe, and say what helps",
    "scaling": "train a series of depths, and say which one a budget is for",
    "bench": "measure this device: kernels, training, inference, peers",
    "export": "write a model for others to use: hotlap export weights",
    "chat": "talk to a model",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line, and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: hotlap COMMAND [flags]     (hotlap COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        print("\n  --debug    show the traceback of an error")
        print("  --profile  of pretrain and sft: write a trace of a few steps, and on a GPU its memory")
        return 0 if arguments else 2
    if int(os.environ.get("RANK", 0)):  # of torchrun's processes, one speaks
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            return guarded(lambda: run(arguments[0], arguments[1:]), debug)
    return guarded(lambda: run(arguments[0], arguments[1:]), debug)


def run(command: str, arguments: list[str]) -> int | None:
    from hotlap.train.log import set_up_logging

    set_up_logging()
    if command == "speedrun":
        return speedrun(arguments)
    if command == "chat":
        from hotlap.chat import main as chat

        return chat(arguments)
    if command == "bench":
        return bench(arguments)
    from hotlap.train import options

    profile, arguments = "--profile" in arguments, [a for a in arguments if a != "--profile"]
    if command == "pretrain":
        from hotlap.train import presets, pretrain

        config = options.parse(
            pretrain.PretrainConfig,
            arguments,
            command=command,
            presets=presets.PRETRAIN,
            depth=presets.from_depth,
        )
        pretrain.pretrain(config, profile)
        print(f"{config.out}/report.md")
    elif command == "sft":
        from hotlap.train import sft

        config = options.parse(sft.SFTConfig, arguments, command=command)
        sft.fine_tune(config, profile)
        print(f"talk to it: python chat.py {config.out}")
    elif command == "data":
        from hotlap.train import prepare

        prepare.make_data(options.parse(prepare.DataConfig, arguments, command=command))
    elif command == "tokenizer":
        from hotlap.train import prepare

        prepare.make_tokenizer_file(options.parse(prepare.TokenizerConfig, arguments, command=command))
    elif command == "eval":
        from hotlap.train import evaluate

        config = options.parse(evaluate.EvalConfig, arguments, command=command)
        print(evaluate.as_table(evaluate.evaluate_model(config)))
    elif command == "export":
        return export(arguments)
    elif command == "scaling":
        return scaling(arguments)
    elif command == "sweep":
        from hotlap.bench.peaks import device_name
        from hotlap.kernels.dispatch import default_device
        from hotlap.train import sweep

        rows = sweep.sweep(
            options.parse(sweep.SweepConfig, arguments, command=command), device_name(default_device())
        )
        print(sweep.markdown(rows))
    elif command == "report":
        from hotlap.train import report

        print(report.write_report(options.parse(report.ReportConfig, arguments, command=command).run))
    else:
        known(command, COMMANDS, "command")
    return None


BENCHMARKS = {
    "look": "whether the kernels run on this GPU, and where the time goes (4 minutes)",
    "check": "whether they are right, and which tiles are fastest (6 minutes)",
    "figures": "training and inference (4 minutes)",
    "kernels": "each operation against every provider and the device's ceiling",
    "training": "tokens/s, MFU and where the time of a step goes",
    "speedrun": "a speedrun's steps on this machine beside the records",
    "inference": "time to the first token and to each next one",
    "peers": "a training step of nanoGPT and nanochat beside ours",
    "compare": "what got slower between two result files",
    "static": "compile every kernel for six GPUs that need not be here",
    "tune": "measure the kernels' tile sizes on this GPU",
}


def usage(command: str, names: dict[str, str], asked: bool) -> int:
    print(f"usage: hotlap {command} NAME [flags]\n")
    print("\n".join(f"  {name:10} {text}" for name, text in names.items()))
    return 0 if asked else 2


def bench(arguments: list[str]) -> int | None:
    from hotlap.train import options

    if not arguments or arguments[0] in ("-h", "--help"):
        return usage("bench", BENCHMARKS, asked=bool(arguments))
    name, flags = known(arguments[0], BENCHMARKS, "benchmark"), arguments[1:]

    def config(kind: type):
        return options.parse(kind, flags, command=f"bench {name}")

    if name in ("look", "check", "figures"):
        from hotlap.bench import suite

        return suite.run_suite(name, config(suite.SuiteConfig))
    if name == "kernels":
        from hotlap.bench import kernels

        rows = kernels.bench_kernels(config(kernels.KernelsConfig))
        return int(any(map(kernels.is_fault, rows)))
    if name == "training":
        from hotlap.bench import training

        training.bench_training(config(training.TrainingConfig))
    elif name == "speedrun":
        from hotlap.bench import speedrun as speedrun_steps

        rows = speedrun_steps.bench_speedrun(config(speedrun_steps.SpeedrunConfig))
        print("\n".join(speedrun_steps.summary(rows)))
    elif name == "inference":
        from hotlap.bench import inference

        inference.bench_inference(config(inference.InferenceConfig))
    elif name == "peers":
        from hotlap.bench import peers

        peers.bench_peers(config(peers.PeersConfig))
    elif name == "compare":
        from hotlap.bench import compare

        print("\n".join(compare.compare(config(compare.CompareConfig))))
    elif name == "static":
        from hotlap.bench import static

        return static.main(config(static.StaticConfig))
    else:
        from hotlap.bench import tune

        return tune.main(config(tune.TuneConfig))
    return None


def scaling(arguments: list[str]) -> None:
    from hotlap.bench import targets
    from hotlap.bench.peaks import device_name
    from hotlap.kernels.dispatch import default_device
    from hotlap.train import options, scaling

    config = options.parse(scaling.ScalingConfig, arguments, command="scaling")
    peers = [
        scaling.Point(
            f"{t.project} {t.name}", float(t.flops_per_token * t.tokens), t.weights, t.tokens, t.bpb
        )
        for t in targets.TARGETS
        if t.bpb is not None
    ]
    device = device_name(default_device())
    price = targets.dollars_per_hour(device, int(os.environ.get("WORLD_SIZE", 1)))
    print(scaling.scaling(config, peers, price, device))


def export(arguments: list[str]) -> int:
    from hotlap.model import export
    from hotlap.train import options

    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print("usage: hotlap export weights [flags]     (hotlap export weights --help lists the flags)")
        return 0
    known(name, ("weights",), "format")
    config = options.parse(export.ExportConfig, arguments[1:], command="export weights")
    print(f"{export.export_weights(config)}")
    return 0


SPEEDRUNS = {
    "tiny": "a model that answers questions about Python, in minutes, with nothing but this machine",
    "minutes": "the best bits per byte that this device reaches in five minutes",
    "gpt2-124m": "modded-nanogpt's main track: to a loss of 3.28 on FineWeb",
    "gpt2-grade": "nanochat's: a model as good as GPT-2, that converses",
}


def speedrun(arguments: list[str]) -> int | None:
    from hotlap.train import options

    if not arguments or arguments[0] in ("-h", "--help"):
        return usage("speedrun", SPEEDRUNS, asked=bool(arguments))
    name, flags = known(arguments[0], SPEEDRUNS, "speedrun"), arguments[1:]

    def config(kind: type):
        return options.parse(kind, flags, command=f"speedrun {name}")

    if name == "tiny":
        from hotlap.train import tiny

        chosen = config(tiny.TinyConfig)
        tiny.tiny_speedrun(chosen)
    else:
        from hotlap.bench import targets
        from hotlap.train import plan, report, speedrun

        hardware = plan.Hardware(targets.throughput, targets.dollars_per_hour)
        points = [report.Point(*point) for point in targets.points(name)]
        run, kind = {
            "minutes": (speedrun.minutes_speedrun, speedrun.MinutesConfig),
            "gpt2-124m": (speedrun.track_speedrun, speedrun.TrackConfig),
            "gpt2-grade": (speedrun.grade_speedrun, speedrun.GradeConfig),
        }[name]
        chosen = config(kind)
        result = run(chosen, hardware, points)
        if result:
            print(f"{(chosen.out / 'report.md').read_text()}\n{chosen.out / 'report.md'}")
        if name != "gpt2-grade" or not result:
            return None
    if sys.stdin.isatty() and sys.stdout.isatty():
        from hotlap.chat import main as chat

        return chat([str(chosen.out / "sft")])
    return None


if __name__ == "__main__":
    raise SystemExit(main())
