"""Where the API key comes from. What is refused as a flag is in tests/helpers/bad_flags.py."""

import pytest

pytest.importorskip("fastapi")

from hotlap.serve.security import KEY_VARIABLE, is_loopback, read_key


def test_the_file_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "e" * 16)
    assert read_key(None) == "e" * 16
    file = tmp_path / "key"
    file.write_text(f"{'f' * 32}\n")
    assert read_key(file) == "f" * 32


@pytest.mark.parametrize("bad", ["", "short", "k" * 15 + " ", "k" * 8 + " " + "k" * 8, "\xe9" * 16])
def test_a_weak_key_is_refused_and_not_shown(monkeypatch, bad):
    monkeypatch.setenv(KEY_VARIABLE, bad)
    with pytest.raises(ValueError, match=KEY_VARIABLE) as caught:
        read_key(None)
    assert not bad.strip() or bad.strip() not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_addresses_of_this_machine_alone(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.example.org"])
def test_addresses_that_others_reach(host):
    assert not is_loopback(host)
