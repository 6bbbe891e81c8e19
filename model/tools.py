"""Tools that a model may call: a calculator, and Python in a sandbox.

A tool is a function from text to text, or to a Future of it if it takes long. It does not raise: its text is
`error: ...` instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from hotlap.common.errors import known
from hotlap.model.calculator import calculate
from hotlap.model.messages import ARGUMENTS, split_call

if TYPE_CHECKING:
    from hotlap.model.sandbox import Sandbox

Tools = Mapping[str, Callable[[str], str | Future[str]]]

TOOLS: Tools = {"calculator": calculate}
DEFAULT_TOOLS = (*TOOLS,)

SECONDS = 5.0  # that a call of python may take
MOST_CHARACTERS = 1000  # of its result: a model's context is small


def check_tools(names: Sequence[str]) -> None:
    """ValueError unless these are names of tools, and at least one."""
    if not names:
        raise ValueError(f"no --tools; known: {', '.join(ARGUMENTS)}")
    for name in names:
        if name not in ARGUMENTS and os.path.exists(name):
            raise ValueError(f"{name} is a path, not a tool; put the model before --tools")
        known(name, ARGUMENTS, "tool")


def named_tools(names: Sequence[str]) -> Tools:
    """The tools of these names. ValueError if one is not known, or needs a sandbox and none works here."""
    check_tools(names)
    tools = {"calculator": lambda: calculate, "python": python_tool}
    return {name: tools[name]() for name in dict.fromkeys(names)}


def described(names: Iterable[str]) -> str:
    """The tools of these names for people, with the sandbox in which Python runs."""
    names = dict.fromkeys(names)
    return ", ".join(f"python (sandbox: {sandbox().tier})" if name == "python" else name for name in names)


def sandbox() -> Sandbox:
    """Where Python runs. ValueError if no sandbox works on this machine."""
    from hotlap.model.sandbox import require_sandbox

    return require_sandbox("the tool python")


def run_tool(call: str, tools: Tools) -> str | Future[str]:
    """Run a call as the model writes it: `python: CODE`, or an expression for the calculator."""
    name, text = split_call(call)
    return tools[name](text) if name in tools else f"error: there is no tool {name}"


def python_tool() -> Callable[[str], Future[str]]:
    """A tool that runs code in a sandbox, as many calls at once as there are cores."""
    isolated = sandbox()
    pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="python-tool")  # starts threads when needed

    def start(code: str) -> Future[str]:
        call = Future()  # stays pending until the end, so that it can be cancelled while the code runs
        pool.submit(_finish, call, isolated, code)
        return call

    return start


def _finish(call: Future[str], isolated: Sandbox, code: str) -> None:
    """Run the code of a call, unless and until that is cancelled."""
    if call.cancelled():
        return
    text = error = None
    try:
        text = run_python(isolated, code, call.cancelled)
    except BaseException as raised:  # who waits for the call gets it
        error = raised
    if call.set_running_or_notify_cancel():
        call.set_exception(error) if error else call.set_result(text)


def run_python(isolated: Sandbox, code: str, cancelled: Callable[[], bool] = lambda: False) -> str:
    """What the code prints; where it fails, with `error: ` and the reason after it."""
    try:
        outcome = isolated.run(code, SECONDS, cancelled=cancelled)
    except OSError as error:
        return f"error: the code could not be run: {error}"
    text = outcome.text.strip("\n")
    return shortened(text if outcome.ok else f"{text}\nerror: {outcome.reason}".lstrip("\n"))


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or about `most` characters of it: its beginning and its end, and how much is left out."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
