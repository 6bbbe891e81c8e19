"""Models that stock classes can compute, their exports, and conversations of every kind."""

import json
from pathlib import Path

from helpers.adapters import PLAIN
from helpers.commands import BAD_DATA, assert_error
from helpers.talks import with_a_sum, with_python
from safetensors.torch import load_file, save_file

from hotlap.cli import main
from hotlap.model.tensors import OFFSETS

PLAIN_ODD = PLAIN | {"vocab_size": 317, "qk_gain": 1.3}  # an odd vocabulary, two query heads of one key head
CAPPED = PLAIN_ODD | {"softcap": 15.0, "qk_gain": 1.0}


def exported(model: Path, name: str = "hf", *flags: str) -> Path:
    """What `hotlap export hf` writes beside a model."""
    out = model.parent / name
    assert main(["export", "hf", str(model), "--out", str(out), *flags]) == 0
    return out


def imported(folder: Path, name: str = "back") -> Path:
    """What `hotlap import hf` writes beside a folder."""
    out = folder.parent / name
    assert main(["import", "hf", str(folder), "--out", str(out)]) == 0
    return out


def assert_refused(capsys, folder: Path, *parts: str) -> None:
    """`hotlap import hf` says on one line what in the folder cannot be ours, and writes nothing."""
    code = main(["import", "hf", str(folder), "--out", str(folder.parent / "out")])
    assert_error(capsys, code, BAD_DATA, str(folder), *parts)
    assert not (folder.parent / "out").exists()


def shard(folder: Path) -> None:
    """Replace a model's weights by the halves that two ranks would have written."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for rank in range(2):
        parts, offsets = {}, {}
        for name, tensor in weights.items():
            half = len(tensor) // 2
            parts[name] = tensor[half:].clone() if rank else tensor[:half].clone()
            offsets[name] = {"saved_offsets": [rank * half] + [0] * (tensor.ndim - 1)}
        save_file(parts, folder / f"shard-{rank}.safetensors", {OFFSETS: json.dumps(offsets)})


def edit(path: Path, **fields: object) -> None:
    """Change fields of a JSON file; None removes one."""
    found = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict:
    return {"role": "assistant", "content": content}


def system(content: object) -> dict:
    return {"role": "system", "content": content}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


PROMPTS = [
    [user("What is 2 + 3?")],
    [system("Be brief."), user("Hello")],
    [user("Hi"), assistant("Hello."), user("And now?")],
    [user("  spaces around  "), assistant(" kept\n"), user("\n\n")],
    [user("日本語 Ελληνικά 🙂 é")],
    [user("\u202eturned, \u200b, \x00 and \t")],
    [user(parts("two ", "parts"))],
    [system(parts("Be ", "brief.")), user(parts("Hi")), assistant(parts("a", "", "b")), user("c")],
    [user("What is {{ messages }} and {% raw %}?")],
    [user("<b>not & escaped</b> \"quoted\" 'twice' \\n")],
    [user("<|not_one|> of <|ours|>, nor bos|>")],
    [user("1234567 and 12,345.6")],
    [*with_a_sum(), user("again")],
    [*with_python(), user("again")],
    [user("a"), assistant(""), user("b")],
]
WHOLE = [  # which do not end with the user
    with_a_sum(),
    with_python("for i in range(3):\n    print({'i': i}, \"x\")\n"),
    [user("a"), *with_python()[1:], user("b"), *with_a_sum()[2:]],
    [user("Hi"), assistant("Hello.")],
    [user("twice"), *with_python()[1:3], *with_python()[1:]],
]
