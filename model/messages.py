"""Check the messages of a conversation, and bring them to one form.

They are TRL's `messages`, which are OpenAI's: dicts with a `role` of system, user, assistant or tool, and a
`content`. An assistant message may have one `tool_calls` entry, which calls `calculator` (argument
`expression`) or `python` (argument `code`); a `tool` message with the result follows, then the assistant
continues.
"""

from __future__ import annotations

import json

from hotlap.common.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
TOOL = "calculator"
ARGUMENTS = {TOOL: "expression", "python": "code"}  # of each tool
FOLLOWS = {  # who may speak after whom; after a call of the assistant, its tool
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("assistant",),
}
RENAMED = {  # roles in other formats
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant", "developer": "system", "function": "tool", "ipython": "tool",
} | {role: role for role in ROLES}  # fmt: skip
PART = '{"type": "text", "text": "..."}'
MESSAGE = '{"role": "...", "content": "..."}'
CALL = '{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "..."}}}'
SHOWN, SHOWN_KEYS = 60, 8  # characters of a wrong text, and keys of an object


def check_messages(messages: object, silence: bool = False) -> list[dict]:
    """The messages in their plain form: keys `role`, `content` (a string) and, for a call, `tool_calls`.

    Parts of text in a list, as OpenAI writes them, become one string. silence: messages may be empty, as
    models and clients make them. DataError says which message is wrong, what was found, and what is needed.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`messages` must be a list of at least one message, not {shown(messages)}")
    found = []
    for i, message in enumerate(messages):
        try:
            message = plain_message(message, silence)
            check_turn(message, found)
        except DataError as error:
            raise DataError(f"message {i}: {error}") from None
        found.append(message)
    return found


def check_turn(message: dict, before: list[dict]) -> None:
    """Raise DataError if another role's message should follow those before."""
    role, last = message["role"], before[-1] if before else {"role": None}
    if last.get("tool_calls"):
        if role != "tool":
            raise DataError(f"from {role!r} after a call; expected tool, with the result of the call")
        return
    expected = FOLLOWS[last["role"]]
    if role in expected:
        return
    if role == "system":
        raise DataError("a system message must be the first one, and the only one")
    if role == last["role"]:
        raise DataError(f"two messages from {role!r} in a row; expected {expected[0]}, or join them")
    where = f"after {last['role']!r}" if before else "at the start"
    raise DataError(f"from {role!r} {where}; expected {' or '.join(expected)}")


def plain_message(message: object, silence: bool) -> dict:
    """One message in its plain form. Keys without a value are as good as absent."""
    if not isinstance(message, dict):
        raise DataError(f"{shown(message)}; needs {MESSAGE}")
    keys = {key: value for key, value in message.items() if value is not None}
    role = keys.pop("role", None)
    if "from" in keys and "value" in keys:
        raise DataError(
            "ShareGPT's keys; rename `from` to `role`, `value` to `content`, and the roles 'human' to 'user' "
            "and 'gpt' to 'assistant'"
        )
    if role is None:
        raise DataError(f"no `role`, but {shown(keys)}; needs {MESSAGE}")
    if role not in ROLES:
        rename = RENAMED.get(role.strip().lower()) if isinstance(role, str) else None
        needed = f"rename it to {rename!r}" if rename else f"needs {', '.join(ROLES)}"
        raise DataError(f"`role` is {shown(role)}; {needed}")
    content, calls = keys.pop("content", None), keys.pop("tool_calls", None)
    if role == "tool":  # whose result it is: always of the call before
        keys.pop("tool_call_id", None)
        keys.pop("name", None)
    if keys:
        raise DataError(
            f"unknown key {', '.join(map(repr, keys))}; a message from {role!r} has `role` and `content`"
            + (", and may have `tool_calls`" if role == "assistant" else "")
        )
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"`tool_calls` must be a list of one call, not {shown(calls)}")
    if calls and role != "assistant":
        raise DataError(f"`tool_calls` from {role!r}; only the assistant can make them")
    if content is None and not calls and not (silence and role == "assistant"):
        raise DataError(f"a message from {role!r} without `content`")
    text = plain_text("" if content is None else content)
    if calls:
        return {"role": role, "content": text, "tool_calls": [plain_call(calls)]}
    if role != "tool" and not text.strip() and not silence:
        raise DataError(f"the {role} says nothing: `content` is empty")
    return {"role": role, "content": text}


def plain_text(content: object) -> str:
    """A message's content as a string, also where it is a list of parts of text."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                raise DataError(f"`content` has {shown(part)} in its list; needs {PART}")
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise DataError(f"`content` has a part of type {shown(part.get('type'))}; needs {PART}")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"`content` must be a string, not {shown(content)}")
    return content


def plain_call(calls: list) -> dict:
    """The only call of a message, with its arguments as a dict."""
    if len(calls) != 1:
        raise DataError(f"{len(calls)} `tool_calls`; one message makes one call, and its result follows")
    (call,) = calls
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise DataError(f"a call needs {CALL}, not {shown(call)}")
    name = function.get("name")
    if not isinstance(name, str) or name not in ARGUMENTS:
        raise DataError(f"calls {shown(name)}; the tools are {' and '.join(map(repr, ARGUMENTS))}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # as OpenAI writes them
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise DataError(f"the call's `arguments` are not JSON: {shown(arguments)}") from None
    if isinstance(arguments, dict):
        arguments = {key: value for key, value in arguments.items() if value is not None}
    wanted = ARGUMENTS[name]
    if not isinstance(arguments, dict) or [*arguments] != [wanted]:
        raise DataError(f"the call's `arguments` must be `{wanted}` alone, not {shown(arguments)}")
    text = arguments[wanted]
    if not isinstance(text, str):
        raise DataError(f"the call's `{wanted}` must be a string, not {shown(text)}")
    if name == TOOL and split_call(text)[0] != TOOL:
        raise DataError(f"the call's `expression` is {shown(text)}, which would be a call of another tool")
    return tool_call(name, text)


def shown(value: object) -> str:
    """A wrong value of a user's file in a few words."""
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}..."
    if isinstance(value, dict):
        keys = [repr(key) for key in value][:SHOWN_KEYS]
        return f"an object with the keys {', '.join(keys)}" if keys else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "null" if value is None else repr(value)[:SHOWN]


def tool_call(name: str, text: str) -> dict:
    """A call of a tool in its plain form."""
    return {"type": "function", "function": {"name": name, "arguments": {ARGUMENTS[name]: text}}}


def called(message: dict) -> tuple[str, str]:
    """The tool that a message in its plain form calls, and the text that it gets."""
    function = message["tool_calls"][0]["function"]
    return function["name"], function["arguments"][ARGUMENTS[function["name"]]]


def call_text(message: dict) -> str:
    """The call of a message in its plain form as the model writes it: `split_call` is the inverse."""
    name, text = called(message)
    return text if name == TOOL else f"{name}: {text}"


def split_call(call: str) -> tuple[str, str]:
    """The tool that a call names, and the text that it gets. A call that names none is the calculator's."""
    name, _, text = call.partition(":")
    name = name.strip()
    return (name, text.removeprefix(" ")) if name in ARGUMENTS and name != TOOL else (TOOL, call)
