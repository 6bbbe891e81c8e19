"""The process in which rewards run: it imports the functions, and calls them one sample at a time.

Its parent talks to it through a pipe of its own, so that what a function prints is not taken for an answer.
An alarm ends it when a function takes too long, also if the parent is gone by then, or Python is stuck in C.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

START_SECONDS = 120.0  # to import the functions: their modules may import torch
LONGEST = 200  # characters of an error's message
LARGEST = 1e9  # of rewards: squares of what they scale stay far within float32
NEEDED = "package.module:function, such as my_rewards:score"


def main(pipe: int, seconds: float, targets: list[str]) -> None:
    """Say whether all functions are there, then answer (target, answer, record) by the reward, until the pipe
    is closed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    sys.path.insert(0, os.getcwd())
    connection, own = Connection(pipe), os.getpid()
    try:
        functions = {target: load(target) for target in targets}
    except ValueError as error:
        reply(connection, refused=str(error))
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    reply(connection)
    while True:
        try:
            target, answer, record = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        said = call(functions[target], answer, record)
        if os.getpid() != own:  # the function forked, and returned in both
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(connection, **said)


def reply(connection: Connection, **said: object) -> None:
    connection.send_bytes(json.dumps(said).encode())


def load(target: str) -> Callable:
    """The function that a target names. ValueError if there is none that takes an answer and a record."""
    module_name, _, name = target.partition(":")
    if not module_name or not name or module_name.startswith("."):
        hint = f"; did you mean {target[:-3]}:function?" if target.endswith(".py") else ""
        raise ValueError(f"the reward {target!r} must be {NEEDED}{hint}")
    function = module = imported(module_name)
    for part in name.split("."):
        if not hasattr(function, part):
            near = difflib.get_close_matches(part, [n for n in vars(function) if n[0] != "_"], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"the module {module.__name__} has no function {name}{hint}")
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f"{target} is {type(function).__name__}, not a function; name {NEEDED}")
    try:
        parameters = inspect.signature(function)
    except ValueError:  # some functions in C have none
        return function
    try:
        parameters.bind("answer", {})
    except TypeError:
        raise ValueError(
            f"the reward {target} takes {parameters}; it must take an answer (str) and its record "
            "(dict), and return a number"
        ) from None
    return function


def imported(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            here = [path.stem for path in Path().glob("*.py")]
            near = difflib.get_close_matches(name.removesuffix(".py"), here, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; name {NEEDED}, of this folder or installed"
            raise ValueError(f"there is no module {error.name}{hint}") from None
        raise ValueError(f"cannot import {name}: {described(error)}") from error
    except BaseException as error:  # whatever the user's module does, it is said in one line
        raise ValueError(f"cannot import {name}: {described(error)}") from error


def call(function: Callable, answer: str, record: dict) -> dict:
    """The reward, or the reason why there is none, and its kind: what counts as the same reason."""
    try:
        value = function(answer, record)
    except BaseException as error:  # also SystemExit: it costs the sample, not the run
        place = place_of(error, getattr(function, "__code__", None))
        return {"reason": described(error, place), "kind": f"{type(error).__name__} at {place}"}
    try:
        return {"reward": number(value)}
    except Exception as error:  # the value may be an object of any class
        return {"reason": described(error), "kind": described(error)}


def number(value: object) -> float:
    """The number that a function returned, which may be a bool, or a tensor without dimensions. TypeError or
    ValueError for what is no number up to LARGEST.
    """
    shape = getattr(value, "shape", ())
    if tuple(shape):
        raise TypeError(f"it returned a {type(value).__name__} of shape {list(shape)}, not one number")
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"it returned {type(value).__name__}, not a number")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"it returned {found}, not a finite number")
    if abs(found) > LARGEST:
        raise ValueError(f"it returned {found:g}; a reward must be from {-LARGEST:g} to {LARGEST:g}")
    return found


def described(error: BaseException, place: str = "") -> str:
    """Type, message and place of an error, on one line."""
    message = " ".join(str(error).split())
    shortened = message if len(message) <= LONGEST else message[:LONGEST] + "..."
    place = place or place_of(error, None)
    return f"{type(error).__name__}: {shortened}" + (f" ({place})" if place else "")


def place_of(error: BaseException, code: object) -> str:
    """File, number and text of the line where an error arose: in the file of this code, if it passed there;
    empty if none but ours did.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<frozen")]
    theirs = [f for f in frames if code is not None and f.filename == code.co_filename] or frames
    return f"{os.path.basename(theirs[-1].filename)}:{theirs[-1].lineno}: {theirs[-1].line}" if theirs else ""
