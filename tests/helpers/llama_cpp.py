"""llama.cpp, in this process, with a model of ours: its completions, chats and tokens."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path


class LlamaCpp:
    """llama.cpp's server with the model of a GGUF file. On one thread, and with an exact cache."""

    def __init__(self, path: Path, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.fit_params = False
        params.verbosity = -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body) -> dict:
        """The reply to a request over HTTP, for what has no function."""
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)
