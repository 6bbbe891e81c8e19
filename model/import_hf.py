"""`hotlap import hf`: a model of Transformers as a model directory of ours. Nothing is run or unpickled."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.files import read_object, write
from hotlap.common.log import log
from hotlap.common.memory import require_memory
from hotlap.common.terminal import printable
from hotlap.kernels.rms_norm import EPS
from hotlap.model.build import build
from hotlap.model.config import GPT2Config, GPTConfig, ImportConfig, Shape, counts_of, rotary_bytes
from hotlap.model.export import new_folder
from hotlap.model.export_code import OWN_CLASS, code_weights, config_of, our_weights
from hotlap.model.foreign_config import OURS, shown
from hotlap.model.gpt2_files import MASK, PREFIX, from_gpt2, gpt2_shape, to_gpt2
from hotlap.model.hf_card import KEPT
from hotlap.model.import_tokenizer import read_tokenizer
from hotlap.model.stock import (
    EMBEDDING,
    HEAD,
    LEARNT,
    QK_NORMS,
    apertus_constants,
    from_stock,
    normalised,
    to_stock,
)
from hotlap.model.stock_config import our_config
from hotlap.model.tensors import Stored, listed, tensors_in
from hotlap.model.weights import CONFIG, STATE, WEIGHTS, is_model, run_checkpoints, save_model

INDEX = f"{WEIGHTS}.index.json"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = {True: 1e-2, False: 1e-6}  # how far from 1 the RMS of a row is by rounding: to 16 bits, or to float32

Reader = Callable[[Path, dict], tuple[Shape, dict[str, Tensor]]]


def import_hf(config: ImportConfig) -> Path:
    """Write a model directory of ours, and return it. DataError says what in the model cannot be ours."""
    config.validate()
    with new_folder(config.out) as partial:
        folder = config.model
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"no {CONFIG} in {folder}; give the folder of a model of Transformers")
        fields = read_object(folder / CONFIG)
        read = READERS.get(str(fields.get("model_type")))
        theirs = {"model_type", "architectures"} & {*fields}
        if not theirs and (is_model(folder) or run_checkpoints(folder)):
            raise DataError(f"{folder} is a model of hotlap already, which all commands open")
        if read is None:
            raise DataError(
                f"{folder / CONFIG}: model_type={shown(fields.get('model_type'))} cannot be imported; "
                f"known: {', '.join(READERS)}"
            )
        try:
            shape, weights = read(folder, fields)
            tokenizer, names = read_tokenizer(folder, fields)
        except DataError as error:
            raise DataError(f"{folder}: {error}") from error
        if tokenizer.vocab_size > shape.vocab_size:
            weights, shape = grown(weights, shape, tokenizer.vocab_size)
            log.warning(
                "%s has no %s: they get rows of their own, the mean of all, which fine-tuning can train",
                folder, ", ".join(names),
            )  # fmt: skip
        if config.context:
            weights, shape = cropped(weights, shape, config.context)
        with torch.device("meta"):
            model = build(shape)
        model.load_state_dict(weights, assign=True)
        save_model(partial, model, tokenizer)
        ours = fields.get(OURS)
        stage = ours.get("stage") if isinstance(ours, dict) else BASE.get(fields["model_type"])
        if isinstance(stage, str) and re.fullmatch(r"[a-z]{1,20}", stage):
            write(partial / STATE, json.dumps({"stage": stage}) + "\n")
    return config.out


def read_apertus(folder: Path, fields: dict) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our configuration and weights of an Apertus that computes what a model of ours can."""
    shape = our_config(fields, "apertus")
    theirs = read_weights(folder, fields, shape, "apertus")
    gains = torch.cat([t.flatten() for name, t in theirs.items() if name.endswith(QK_NORMS)])
    if not (gains > 0).all() or not (gains == gains[0]).all():
        raise DataError("q_norm and k_norm have weights that differ; ours are one number, qk_gain")
    gain = float(str(np.float32(gains[0])))  # the shortest number that rounds to it, such as 1.2
    shape = dataclasses.replace(shape, qk_gain=gain)
    for name, constant in apertus_constants(shape).items():
        check_constant(name, theirs[name], constant)
    weights = from_stock(theirs, shape, "apertus")
    weights["embedding.weight"] = embedding_of(folder, theirs[EMBEDDING])
    return shape, weights


def read_nanochat(folder: Path, fields: dict) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our configuration and weights of a NanoChat."""
    shape = our_config(fields, "nanochat")
    return shape, from_stock(read_weights(folder, fields, shape, "nanochat"), shape, "nanochat")


def read_own(folder: Path, fields: dict) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Our configuration and weights of the class that `hotlap export hf` puts beside models with extras."""
    shape = config_of(fields)
    return shape, our_weights(read_weights(folder, fields, shape, OWN_CLASS))


def read_gpt2(folder: Path, fields: dict) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Our configuration and weights of a GPT-2. Old files have names without the prefix, and constant masks;
    some have the head, too.
    """
    shape, stored = gpt2_shape(fields), tensors_in(weight_files(folder))
    check_claim(folder, shape, stored)
    with torch.device("meta"):
        ours = build(shape).state_dict()
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    expected = {prefix + name.removeprefix(PREFIX): tensor for name, tensor in to_gpt2(ours).items()}
    embedding = f"{prefix}wte.weight"
    if HEAD in stored:
        expected[HEAD] = expected[embedding]
    stored = {name: tensor for name, tensor in stored.items() if not MASK.fullmatch(name)}
    theirs = read_as_float32(stored, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    if HEAD in theirs and not torch.equal(theirs[HEAD], theirs[embedding]):
        raise DataError(f"{HEAD} differs from {embedding}; our GPT-2 has one tensor for both")
    theirs = {PREFIX + name.removeprefix(PREFIX): tensor for name, tensor in theirs.items()}
    return shape, from_gpt2(theirs, [*ours])


READERS: dict[str, Reader] = {  # by model_type
    "apertus": read_apertus,
    "nanochat": read_nanochat,
    OWN_CLASS: read_own,
    "gpt2": read_gpt2,
}
BASE = {"gpt2": "pretrain"}  # the stage of models whose files do not say


def read_weights(folder: Path, fields: dict, shape: GPTConfig, kind: str) -> dict[str, Tensor]:
    """The tensors of a class, in float32; a tied head is copied."""
    stored = tensors_in(weight_files(folder))
    check_claim(folder, shape, stored)
    with torch.device("meta"):
        weights = build(shape).state_dict()
        expected = code_weights(weights) if kind == OWN_CLASS else to_stock(weights, shape, kind)
    tied = fields.get("tie_word_embeddings") and HEAD not in stored
    if tied:
        del expected[HEAD]
    theirs = read_as_float32(stored, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    return theirs | ({HEAD: theirs[EMBEDDING].clone()} if tied else {})


def check_claim(folder: Path, shape: Shape, stored: dict[str, Stored]) -> None:
    """Raise DataError or ValueError for a config.json of far more than the tensors, or the memory, hold."""
    claimed = counts_of(shape)["total"]
    if claimed > 2 * sum(math.prod(tensor.shape) for tensor in stored.values()):
        raise DataError(
            f"{CONFIG} is of a model of {claimed:,} parameters, but the tensors there are of less"
        )
    needed = 8 * claimed + 2 * rotary_bytes(shape)  # theirs and ours, and the tables of who opens it
    require_memory(f"the model in {folder}", needed, "use a machine with more, or a smaller model")


def weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a model: one, or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = [path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))]
        why = f"; {pickled[0]} is pickled, which may run code: save it as safetensors" if pickled else ""
        raise DataError(f"there is no {WEIGHTS}{why}")
    names = read_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{INDEX} has no weight_map from names to files")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{INDEX} names {name!r}, and there is no such file; copy the model again")
    return [folder / name for name in files]


def read_as_float32(stored: dict[str, Stored], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors of these names and shapes. DataError lists what differs, or is not finite."""
    found = [f"{name}: {'missing' if name in shapes else 'unknown'}" for name in {*stored} ^ {*shapes}]
    for name in {*stored} & {*shapes}:
        if len(stored[name].parts) > 1:
            found.append(f"{name}: in two files")
        elif stored[name].shape != shapes[name]:
            found.append(f"{name}: of shape {[*stored[name].shape]}, not {[*shapes[name]]}")
        elif stored[name].dtype not in DTYPES:
            found.append(f"{name}: {stored[name].dtype} is not supported")
    if found:
        raise DataError(f"its tensors are not those of its {CONFIG}: {listed(sorted(found))}")
    tensors = {}
    for path in sorted({tensor.parts[0].path for tensor in stored.values()}):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {
                    n: file.get_tensor(n).float() for n, t in stored.items() if t.parts[0].path == path
                }
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    if damaged := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise DataError(f"not all numbers are finite in {listed(damaged)}; copy the model again")
    return tensors


def check_constant(name: str, found: Tensor, needed: Tensor) -> None:
    """Raise DataError if a tensor that we have no place for is not what our models compute with."""
    if name.endswith("act_fn.eps"):  # of the part of xIELU that is multiplied by 0
        return
    seen = torch.nn.functional.softplus if name.endswith(LEARNT) else torch.Tensor.float
    rounded = [seen(needed.to(dtype).float()) for dtype in DTYPES]
    if not any(torch.allclose(seen(found), value, rtol=1e-6, atol=1e-6) for value in rounded):
        worst = found.flatten()[(found - needed).abs().argmax()]
        what = "xIELU that is not ReLU²" if "act_fn" in name else "a norm with other weights than 1"
        raise DataError(
            f"{name} is {worst:.6g} instead of {needed.flatten()[0]:.6g}: our models have no {what}"
        )


def embedding_of(folder: Path, rows: Tensor) -> Tensor:
    """Our embedding, whose rows our models divide by their RMS, for an Apertus', which are added as they are.

    The very rows that `hotlap export hf` kept are taken, if they are still those of the model.
    """
    if (folder / KEPT).is_file():
        stored = tensors_in([folder / KEPT])
        kept = read_as_float32(stored, {EMBEDDING: tuple(rows.shape)})[EMBEDDING]
        if torch.allclose(normalised(kept), rows, rtol=1e-6, atol=1e-7):
            return kept
        log.warning("%s is of other weights, and is not used", folder / KEPT)
    near = NEAR[any(torch.equal(rows, rows.to(dtype).float()) for dtype in DTYPES[1:])]
    rms = rows.double().square().mean(-1, keepdim=True).sqrt()
    if rms.max() > 1 + near:
        raise DataError(
            f"{EMBEDDING} has a row whose RMS is {rms.max():.6g}; our models divide rows by their RMS, so it "
            "must be at most 1"
        )
    # Our norm adds EPS to the mean square, so a row of any RMS m below 1 comes from one of this scale.
    scale = (EPS / (1 - rms.square()).clamp(min=EPS)).sqrt()
    return torch.where(rms < 1 - near, rows * scale, rows).float()


def grown(weights: dict[str, Tensor], shape: Shape, vocab_size: int) -> tuple[dict[str, Tensor], Shape]:
    """The weights with rows for more ids, padded to a multiple of 64, as for pretraining. They are the mean
    of all rows, so that the logit of a new token is the mean logit: by Jensen's inequality, its probability
    is at most the average one. With rows of zeros it could be likelier than most.
    """
    rows = -(-vocab_size // 64) * 64
    tables = {
        name: torch.cat([table, table.mean(0, keepdim=True).expand(rows - len(table), -1)])
        for name, table in weights.items()
        if name in ("embedding.weight", "head.weight")
    }
    return weights | tables, dataclasses.replace(shape, vocab_size=rows)


def cropped(weights: dict[str, Tensor], shape: Shape, context: int) -> tuple[dict[str, Tensor], Shape]:
    """The weights of a model with a shorter context, in which it computes the same."""
    if context > shape.context:
        raise ValueError(f"context={context} must be at most the model's {shape.context}")
    shorter = dataclasses.replace(shape, context=context)
    if shorter.windows != tuple(min(window, context) for window in shape.windows):
        raise ValueError(
            f"context={context} would shorten the model's attention windows, too, which are a quarter of its "
            f"context of {shape.context}; leave it out"
        )
    if isinstance(shape, GPT2Config):
        weights = weights | {"positions.weight": weights["positions.weight"][:context].clone()}
    return weights, shorter


def main(config: ImportConfig) -> None:
    """`hotlap import hf`."""
    print(printable(str(import_hf(config))))
