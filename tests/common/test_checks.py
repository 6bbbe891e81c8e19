"""Every number of every configuration: what cannot work is refused by name, before it is used."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator

import pytest

from hotlap.cli import COMMANDS, Group, Table

BAD = (math.nan, math.inf, -math.inf, -1, 0, 2**70, -(2**70))
# Accepted on purpose: 0 where it switches something off, or means all or the default; and 2^70 FLOPs.
ZERO = {
    "adamw_decay", "backout", "bigram_rows", "budget_dollars", "budget_flops", "budget_hours", "clip",
    "clip_high", "clip_low", "dollars_per_hour", "epochs", "final_lr", "grace", "kl", "label_smoothing",
    "limit", "lora_rank", "max_per_task", "min_p", "minutes", "momentum", "num_fewshot", "port",
    "prompt", "ratio", "requests", "resample", "rows", "seconds", "seed", "sft_weight", "softcap",
    "temperature", "top_k", "top_p", "validation_questions", "validation_tokens", "warmdown",
    "warmup_steps", "weight_decay",
}  # fmt: skip
NEEDED = {
    "MinutesConfig.minutes", "KernelsConfig.seconds", "PeersConfig.seconds", "RLConfig.temperature",
    "RLConfig.top_p", "ScalingConfig.ratio", "ServingConfig.prompt", "ServingConfig.seconds",
    "TuneConfig.seconds",
}  # fmt: skip


def modules(table: Table) -> Iterator[str]:
    for row in table.values():
        if isinstance(row, Group):
            yield from modules(row.commands)
        else:
            yield row.config.partition(":")[0]


def configs() -> dict[str, type]:
    """The configurations of all commands, by name."""
    found = {}
    for name in modules(COMMANDS):
        module = importlib.import_module(f"hotlap.{name}")
        kinds = (value for value in vars(module).values() if isinstance(value, type))
        found |= {
            k.__name__: k for k in kinds if dataclasses.is_dataclass(k) and k.__name__.endswith("Config")
        }
    parts = (
        "GPTConfig",
        "GPT2Config",
        "LoopConfig",
        "OptimConfig",
        "ScheduleConfig",
        "StageConfig",
        "SuiteConfig",
        "TuneConfig",
    )
    return {name: kind for name, kind in found.items() if name not in parts}


def numbers(whole: object, change, path: str = "") -> Iterator[tuple[str, type, Callable]]:
    """(path, int or float, function that returns the whole with another number there) of every number."""
    for field in dataclasses.fields(whole):
        value, place = getattr(whole, field.name), f"{path}.{field.name}"

        def changed(new: object, name: str = field.name) -> object:
            return change(dataclasses.replace(whole, **{name: new}))

        if dataclasses.is_dataclass(value):
            yield from numbers(value, changed, place)
        elif "float" in field.type or "int" in field.type:
            kind = float if "float" in field.type else int
            yield place, kind, lambda bad, old=value, changed=changed: changed(first_replaced(old, bad))


def first_replaced(value: object, bad: float) -> object:
    """The bad number, also in place of the first number in nested tuples."""
    return (first_replaced(value[0], bad), *value[1:]) if isinstance(value, tuple) else bad


FIELDS = {
    f"{name}{path}": (kind, change)
    for name, config in configs().items()
    for path, kind, change in numbers(config(), lambda whole: whole)
}


def accepted(path: str, bad: float) -> bool:
    name = path.rsplit(".", 1)[1]
    if bad == 0:
        return name in ZERO and path not in NEEDED
    return bad == 2**70 and name == "budget_flops"


def test_the_commands_have_many_numbers():
    assert len(FIELDS) > 80 and {"SFTConfig.optim.matrix_lr", "ChatConfig.seed"} <= set(FIELDS)


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_a_number_that_cannot_work_is_refused_by_name(path):
    kind, change = FIELDS[path]
    for bad in BAD:
        if kind is int and not isinstance(bad, int):
            continue
        config = change(kind(bad))
        if accepted(path, bad):
            config.validate()
            continue
        with pytest.raises(ValueError, match=path.rsplit(".", 1)[1].rstrip("s")):
            config.validate()
            print(f"{path}={bad} was accepted")
