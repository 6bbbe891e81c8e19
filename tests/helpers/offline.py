"""Clients of the API that want to tell or ask somebody else, kept on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

import pytest

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Set what the packages read when they are imported. Names of other machines are not found, and who looks
    for one fails the test.

    Hugging Face's packages keep what they have read: they are imported before, and set for as long as this.
    """
    found, sought = socket.getaddrinfo, []
    hub = pytest.importorskip("huggingface_hub")
    datasets = pytest.importorskip("datasets")

    def getaddrinfo(host, *arguments, **named):
        if not is_here(host):
            sought.append(host)
            raise socket.gaierror(socket.EAI_NONAME, f"{host} is not this machine")
        return found(host, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        patch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield
    assert not sought


def is_here(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
