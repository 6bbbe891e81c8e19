"""Rows of bad input: sweeps, scaling, ablations, speedruns and benchmarks."""
# ruff: noqa: E501  a row is one line

from helpers.bad_files import MANY, Row, text
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE

SCALING = "scaling --depths 1 2 3 --data text.txt --out new"

ROWS: list[Row] = [
    # sweeps and ablations
    ("sweep --preset tinny --out new", None, USAGE, r"'tinny'; did you mean 'tiny'"),
    ("sweep --seeds 0 --out new", None, USAGE, r"--seeds 0 must be at least 1"),
    ("sweep --seconds nan --out new", None, USAGE, r"--seconds nan must be 0"),
    ("sweep --out new", None, USAGE, r"nothing to compare with the base; give variants"),
    ("sweep --variants model.layres=2 --out new", None, USAGE, r"key in model\.layres=2: 'model\.layres'; did you mean 'model\.layers'"),
    ("sweep --variants '' --out new", None, USAGE, r"'' trains the same as 'base'"),
    ("sweep --variants model.layers=2 --out text.txt", None, CANNOT_CREATE, r"text\.txt cannot be a run's directory"),
    ("sweep --variants model.smear --out new", None, USAGE, r"'model\.smear' is not a string of TOML"),
    ("sweep --variants model.smear=true --out new", None, USAGE, r"'model\.smear=true' trains the same as 'base'"),
    ("sweep --variants model.layers=2 model.layers=2 --out new", None, USAGE, r"--variants has 'model\.layers=2' twice"),
    (f"sweep --base model.context={MANY} --variants model.layers=2 --out new", None, USAGE, rf"a context of {MANY} tokens needs at least"),
    (f"sweep --variants batch_rows={MANY} --out new", None, USAGE, rf"'batch_rows={MANY}' reads [\d,]+ tokens in one step, and the base"),
    ("ablations --only smeer --out new", None, USAGE, r"unknown ablation: 'smeer'"),
    ("ablations --only base --out new", None, USAGE, r"nothing to compare with the base"),
    ("ablations --seeds -1 --out new", None, USAGE, r"--seeds -1 must be at least 1"),
    (f"ablations --base model.layers={MANY} --only GELU --out new", None, USAGE, r"training .* parameters needs at least"),
    # scaling
    (f"{SCALING} --depths 1 2", None, USAGE, r"depths.* must be at least 3 different depths"),
    (f"{SCALING} --depths 1,2,3", None, USAGE, r"--depths '1,2,3' must be as many numbers as --help shows"),
    (f"{SCALING} --data none.txt", None, NO_INPUT, r"'none\.txt'.*name a file"),
    (f"{SCALING} --depths 1 2 100000", None, USAGE, r"depth.*100000 must be from 1"),
    (f"{SCALING} --depths 1 2 900", None, USAGE, r"training .* parameters needs at least"),
    (f"{SCALING} --context {MANY}", None, USAGE, rf"--context {MANY} must be at most"),
    (f"{SCALING} --ratio 1e-18", None, USAGE, r"--ratio 1e-18 gives 0 steps"),
    (f"{SCALING} --ratio nan", None, USAGE, r"--ratio nan must be positive"),
    (f"{SCALING} --budget-flops inf", None, USAGE, r"--budget-flops inf must be 0"),
    (f"{SCALING} --budget-flops 10", None, USAGE, r"--budget-flops 10(\.0)? is too little for one step"),
    (f"{SCALING} --out .", None, CANNOT_CREATE, r"\. holds .* and no series; choose another --out"),
    # speedruns
    ("speedrun minutes --minutes 0 --out new", None, USAGE, r"--minutes 0(\.0)? must be positive"),
    ("speedrun gpt2-124m --runs 0 --out new", None, USAGE, r"--runs 0 must be a number from 1"),
    ("speedrun gpt2-grade --talks smoltalk mmlu:0 --out new", None, USAGE, r"the weight in the data 'mmlu:0' must be above 0"),
    ("speedrun gpt2-grade --depth 0 --out new", None, USAGE, r"--depth 0 must be from 1 to 1000"),
    # benchmarks
    ("bench kernels --rows -1 --out new", None, USAGE, r"--rows -1 must be 0"),
    (f"bench kernels --rows {2048 * MANY} --out new", None, USAGE, rf"--rows {2048 * MANY} needs at least .* GB.*lower --rows"),
    (f"bench training --models tiny --rows {MANY} --out new", None, USAGE, rf"tiny with --rows {MANY} needs at least .*lower --rows"),
    (f"bench training --models tiny --rows 1 --steps {MANY} --out new", None, USAGE, r"random tokens of .* needs at least .*--steps"),
    ("bench training --models d13 --out new", None, USAGE, r"unknown model: 'd13'"),
    (f"bench speedrun --recipe tiny --rows {MANY} --out new", None, USAGE, rf"tiny with --rows {MANY} needs at least"),
    ("bench speedrun --recipe tinny --out new", None, USAGE, r"did you mean 'tiny'"),
    (f"bench inference --model tiny --batches {MANY} --out new", None, USAGE, rf"a cache of {MANY} x 129 tokens needs at least .* GB"),
    ("bench inference --model tiny --batches 0 --out new", None, USAGE, r"--batches .*0.* must be numbers of at least 1"),
    (f"bench inference --model tiny --prompt {MANY} --out new", None, USAGE, rf"--prompt {MANY} must leave room in tiny's context of 256"),
    ("bench inference --model d9 --out new", None, USAGE, r"unknown model: 'd9'"),
    ("bench inference --model tiny --out text.txt", None, CANNOT_CREATE, r"cannot write results to text\.txt"),
    ("bench kernels --operations softmax --out new", None, USAGE, r"unknown operation: 'softmax'"),
    ("bench kernels --seconds 0 --out new", None, USAGE, r"--seconds 0\S* must be positive"),
    ("bench kernels --rows 3000 --out new", None, USAGE, r"--rows 3000 must be at most 2048 or a multiple of it"),
    ("bench kernels --minutes -1 --out new", None, USAGE, r"--minutes -1\S* must be 0 \(no limit\) or more"),
    ("bench training --steps 0 --out new", None, USAGE, r"--steps 0 must be at least 1"),
    ("bench training --micro-batches 0 --out new", None, USAGE, r"--micro-batches 0 must be at least 1"),
    ("bench tune --seconds 0", None, USAGE, r"--seconds 0\S* must be positive"),
    ("bench look --minutes -1", None, USAGE, r"--minutes -1\S* must be 0 \(the call's default\) or more"),
    ("bench peers --nanogpt . --seconds 0", None, USAGE, r"--seconds 0\S* must be positive"),
    ("bench peers --nanogpt nowhere", None, NO_INPUT, r"no checkout of nanogpt at nowhere"),
    ("bench peers", None, USAGE, r"no peer; name a checkout"),
    ("bench compare none.json b.json", None, NO_INPUT, r"no results at none\.json"),
    ("bench compare a.json a.json", text("a.json", "[]"), BAD_DATA, r"a\.json is not a file of results"),
]  # fmt: skip
