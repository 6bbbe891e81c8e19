"""llama.cpp in this process, with the model of a GGUF file."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor


class LlamaCpp:
    """llama.cpp's server, on one thread, with a context of one slot and an exact cache."""

    def __init__(self, path: Path, context: int):
        xllamacpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.fit_params = False
        params.verbosity = -1  # else it logs to the standard output
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: object) -> dict:
        """The reply to a request over HTTP, also if it is an error."""
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text. special: it begins with the first token, and may spell special ones."""
        return self.post("/tokenize", content=text, parse_special=special, add_special=special)["tokens"]

    def continued(self, ids: list[int], tokens: int, logprobs: int = 0) -> list[dict]:
        """The likeliest tokens after ids, each with its `id`, `logprob` and `top_logprobs`."""
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": logprobs or 1}
        return self.server.handle_completions(body)["choices"][0]["logprobs"]["content"]

    def logprobs(self, ids: list[int], vocab_size: int) -> Tensor:
        """Log-probabilities (T, V) of what follows each of the ids."""
        found = torch.full((len(ids), vocab_size), torch.nan)
        for i in range(len(ids)):
            (token,) = self.continued(ids[: i + 1], 1, vocab_size)
            for other in token["top_logprobs"]:
                found[i, other["id"]] = other["logprob"]
        return found

    def chat(self, messages: list[dict], tokens: int) -> dict:
        """The likeliest answer: the reply to a request of OpenAI's API."""
        return self.server.handle_chat_completions(
            {"messages": messages, "max_tokens": tokens, "temperature": 0}
        )
