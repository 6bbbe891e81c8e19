"""The safety filter by itself: lists, hooks that fail, and text that is checked before it passes."""

import logging
import random
import re
import threading
import time

import pytest

from hotlap.common.errors import DataError
from hotlap.serve import moderation
from hotlap.serve.blocklist import LONGEST
from hotlap.serve.moderation import (
    Blocked,
    CheckedText,
    GuardedHook,
    Moderation,
    load_moderation,
    moderated,
    require_allowed,
)


@pytest.fixture
def listed(tmp_path):
    """The filter of a list with these lines."""

    def load(*lines: str) -> Moderation:
        (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
        return load_moderation(str(tmp_path / "list.txt"))

    return load


def passed(pieces: list[str], moderate: Moderation) -> tuple[str, bool]:
    """What passes of an answer in these pieces, and whether it was blocked."""
    said, stream = "", moderated((piece for piece in pieces), moderate)
    try:
        for text in stream:
            said += text
    except Blocked:
        return said, True
    return said, False


def splits(text: str, seed: int) -> list[str]:
    """The text in random pieces, of which some are empty."""
    drawn = random.Random(seed)
    places = sorted(drawn.choices(range(len(text) + 1), k=drawn.randrange(len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# Lists


@pytest.mark.parametrize(
    ("line", "text", "blocked"),
    [
        ("bad", "a bad word", True),
        ("bad", "BAD!", True),
        ("bad", "badly", False),
        ("bad", "abad", False),
        ("bad", "bad_x", False),
        ("BAD", "bad", True),
        ("stra\u00dfe", "STRASSE", True),
        ("\u03bf\u03b4\u03cc\u03c2", "\u039f\u0394\u038c\u03a3", True),
        ("very bad", "very bad", True),
        ("very bad", "very \n bad", True),
        ("very bad", "verybad", False),
        ("very bad", "a very badly", False),
        ("c++", "use C++ now", True),
        ("c++", "c++x", False),
        ("a.c", "abc", False),
        ("# nothing", "nothing", False),
        (r"/ba[dt]\b/", "bat", True),
        (r"/ba[dt]\b/", "batter", False),
        ("/bad/", "abADly", True),
        ("/", "either / or", True),
    ],
)
def test_a_list_finds_whole_words_and_expressions_in_any_case(listed, line, text, blocked):
    allowed, reason = listed("never said", "", line)(text, "input")
    assert allowed != blocked and reason == ("list.txt:3" if blocked else "")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"ok\n/(/", r"list\.txt:2: not a regular expression"),
        (b"/a{99999999999}/", r"list\.txt:1: not a regular expression"),
        (b"ok\n\n/x*/", r"list\.txt:3: .*matches an empty text"),
        (b"ok\n\xff", r"list\.txt:2: not UTF-8"),
        (b"ok\n" + b"x" * 101, r"list\.txt:2: an entry of 101 characters.*at most 100"),
        (b"", r"list\.txt: the list is empty"),
        (b"# a comment\n\n", r"list\.txt: the list is empty"),
    ],
)
def test_what_is_wrong_with_a_list_names_its_line(tmp_path, lines, words):
    (tmp_path / "list.txt").write_bytes(lines)
    with pytest.raises(DataError, match=words):
        load_moderation(str(tmp_path / "list.txt"))


def test_a_list_may_come_from_windows(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfbad\r\nworse\r\n")
    moderate = load_moderation(str(tmp_path / "list.txt"))
    assert not moderate("bad", "input")[0] and not moderate("worse", "input")[0]


def test_the_example_is_a_list():
    moderate = load_moderation(moderation.__file__.replace("moderation.py", "blocklist-example.txt"))
    assert not moderate("Shut up.", "output")[0] and moderate("idiotic", "output")[0]


# Hooks


def test_a_function_is_imported(tmp_path, monkeypatch):
    (tmp_path / "mine_to_filter.py").write_text("def hook(text, direction):\n    return False, direction\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_moderation("mine_to_filter:hook")("x", "output") == (False, "output")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("none.txt", "is no file, and names no function; it needs a file.*package.module:function"),
        (".", "is no file"),
        ("a/b:c", "is no file"),
        ("no_such_module:f", "cannot be imported .*No module named.*PYTHONPATH"),
        ("broken_filter:f", "cannot be imported .*ZeroDivisionError"),
        ("string:no_such_function", "no_such_function is missing"),
        ("string:digits", "digits cannot be called"),
        ("asyncio:sleep", "sleep is async"),
    ],
)
def test_what_is_no_filter_is_refused(spec, words, tmp_path, monkeypatch):
    (tmp_path / "broken_filter.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=words):
        load_moderation(spec)


def raising(text, direction):
    raise KeyError(text)


def leaving(text, direction):
    raise SystemExit(0)


async def awaited(text, direction):
    return True, ""


@pytest.mark.parametrize(
    ("hook", "why"),
    [
        (raising, "KeyError at .*test_moderation.py"),
        (leaving, "SystemExit"),
        (lambda text: (True, ""), "TypeError"),
        (lambda text, direction: True, "returned bool"),
        (lambda text, direction: None, "returned NoneType"),
        (lambda text, direction: (1, ""), "returned tuple"),
        (lambda text, direction: (True, None), "returned tuple"),
        (lambda text, direction: (True, "", ""), "returned tuple"),
    ],
)
def test_a_hook_that_fails_blocks_and_the_log_says_why_once_without_the_text(hook, why, caplog):
    moderate = GuardedHook(hook)
    assert [moderate("Sesame", "input")[0] for _ in range(3)] == [False] * 3
    assert passed(["Sesame"], moderate) == ("", True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "Sesame" not in caplog.text
    assert re.search(why, record.getMessage())


def test_a_hook_that_hangs_blocks_in_time_and_is_not_called_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(moderation, "SECONDS", 0.05)
    monkeypatch.setattr(moderation, "MOST_CALLS", 3)
    go_on, calls = threading.Event(), []

    def hang(text, direction):
        calls.append(text)
        go_on.wait(20)
        return True, ""

    moderate, began = GuardedHook(hang), time.monotonic()
    try:
        assert not any(moderate("x", "input")[0] for _ in range(6))
        assert time.monotonic() - began < 5 and len(calls) == 3
        assert (
            "took more than 0.05 seconds" in caplog.text and "3 calls of it have not returned" in caplog.text
        )
    finally:
        go_on.set()
    until = time.monotonic() + 10
    while not moderate("x", "input")[0]:  # once they have returned, it is asked again
        assert time.monotonic() < until


def test_a_hook_that_fails_is_not_asked_again_about_an_answer():
    asked = []

    def fail(text, direction):
        asked.append(text)
        raise OSError("no connection")

    text = "word " * 200
    assert passed([text, text], GuardedHook(fail)) == ("", True) and len(asked) == 1


def test_a_reason_is_one_short_line_without_control_characters():
    _, reason = GuardedHook(lambda text, direction: (False, "a\n\x1b[2Jb" + "c" * 1000))("x", "input")
    assert reason.startswith("a [2Jb") and len(reason) == 200


def test_every_text_of_a_user_is_checked(listed):
    moderate = listed("bad")
    require_allowed(["a", "b"], moderate)
    require_allowed(["bad"], None)
    with pytest.raises(Blocked, match=r"blocked this text \(list.txt:1\)"):
        require_allowed(["a", "so bad"], moderate)


# Streams

WORDS = ("bad", "very bad dog", "c++", "++x", "\u732b")
FOUND = re.compile(r"(?<!\w)(bad|very\s{1,4}bad\s{1,4}dog|c\+\+|\+\+x|\u732b)(?!\w)")
LETTERS = ["bad", "very", "dog", "c", "++", "x", " ", " ", "\n", "-", "ly", "\u732b", "."]


def test_what_passes_ends_before_the_first_phrase_however_a_text_is_cut(listed):
    moderate = listed(*WORDS)
    for seed in range(400):
        drawn = random.Random(seed)
        text = "".join(drawn.choices(LETTERS, k=drawn.randrange(40)))
        said, blocked = passed(splits(text, seed), moderate)
        found = FOUND.search(text)
        assert blocked == bool(found) and text.startswith(said), (text, seed)
        assert len(said) <= found.start() if found else said == text, (text, seed)
        assert said == passed([text], moderate)[0] == passed(list(text), moderate)[0], (text, seed)


def test_nothing_of_a_phrase_passes_in_a_long_text(listed):
    phrases = ("bad", "very bad dog", "a b", "c++", "x" * LONGEST)
    moderate = listed(*phrases)
    for seed in range(150):
        drawn = random.Random(seed)
        phrase, others = drawn.choice(phrases), ["good", "very", "verily", "a", "dog", "x" * 150]
        before = " ".join(drawn.choices(others, k=drawn.randrange(60)))
        text = f"{before} {phrase} after" + " and on" * drawn.randrange(60)
        said, blocked = passed(splits(text, seed), moderate)
        assert blocked and f"{before} ".startswith(said), (text, seed)
        assert said == passed([text], moderate)[0], (text, seed)


@pytest.mark.parametrize("lines", [["bad"], ["bad", "very bad"], ["/bad/"]])
@pytest.mark.parametrize("word", ["fine ", "\u597d", "x" * 1000, ". "])
def test_little_is_held_back_whatever_is_said(listed, lines, word):
    checked = CheckedText(listed(*lines))
    text, most = word * (2000 // len(word)), 2 * checked._moderate.longest
    said = ""
    for i, letter in enumerate(text, 1):
        said += checked.push(letter)
        assert i - len(said) <= most
    assert said + checked.finish() == text


def test_expressions_are_found_at_every_cut(listed):
    moderate = listed("/not[ -]ok/", r"/\bend$/")
    for text in ("this is not ok, she said", "a" * 300 + " not-ok", "the end"):
        for cut in range(len(text)):
            said, blocked = passed([text[:cut], text[cut:]], moderate)
            assert blocked and not said.endswith(("n", "not", "e", "end")) and text.startswith(said)


def test_a_function_sees_each_part_with_what_is_around_it():
    seen = []
    moderate = GuardedHook(lambda text, direction: (seen.append((text, direction)), (True, ""))[1])
    text = " ".join(f"word{i}" for i in range(300))
    assert passed(list(text), moderate) == (text, False)
    assert {direction for _, direction in seen} == {"output"} and seen[-1][0].endswith("word299")
    assert all(len(window) <= 4 * LONGEST and window.startswith("word") for window, _ in seen)
    pairs = [text[i : i + LONGEST] for i in range(len(text) - LONGEST)]
    assert all(any(part in window for window, _ in seen) for part in pairs)


def test_a_blocked_stream_stops_generating(listed):
    said = []

    def generating():
        for word in ["one", "two", "bad", "three", "four", "five", "six"]:
            said.append(word)
            yield word + " "

    stream = moderated(generating(), listed("bad"))
    assert "".join(next(stream) for _ in range(3)).startswith("one")
    with pytest.raises(Blocked, match="the rest of this answer"):
        list(stream)
    assert "six" not in said


def test_without_a_filter_pieces_pass_as_they_are():
    assert list(moderated((piece for piece in ["a", "", "b"]), None)) == ["a", "", "b"]
