"""From logits to tokens, with one wait for the device."""
# B requests that get a token, E prompt tokens that are scored, V vocab

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hotlap.common.gpu import to_device, widest
from hotlap.kernels.batch_invariant import log_softmax
from hotlap.model.request import Request, Token
from hotlap.model.sampling import sample


def next_tokens(
    logits: Tensor, requests: list[Request], echoed: list[tuple[Request, int]], vocab_size: int
) -> tuple[list[Token], list[Token]]:
    """The next token of each request, forced or sampled, and the tokens of prompts that are scored.

    logits: (B + E, V), a row for each request and then one for each of `echoed`, a request and the index of a
    token of its prompt. V may be more than `vocab_size`, and those ids are neither sampled nor listed.
    FloatingPointError if the logits are not finite.
    """
    text = logits[:, :vocab_size]
    sampled = [not request.forced for request in requests]
    chosen = torch.empty(0, dtype=torch.int64, device=logits.device)
    if requests:
        chosen = sample(text[: len(requests)], [request.draw() for request in requests])
    if not all(sampled) or echoed:
        given = [request.forced.popleft() if request.forced else -1 for request in requests]
        given = to_device(given + [request.prompt[i] for request, i in echoed], logits.device)
        chosen = torch.where(given < 0, F.pad(chosen, (0, len(echoed))), given)
    columns = [chosen[:, None], logits.sum(-1, keepdim=True)]  # a sum is finite if all logits are
    of_rows = requests + [request for request, _ in echoed]
    if scored := [request.logprobs or 0 for request in of_rows if request.scores]:
        logprobs = log_softmax(logits)
        top = logprobs[:, :vocab_size].topk(min(max(scored), vocab_size))
        columns += [logprobs.gather(1, chosen[:, None]), top.indices, top.values]
    wide = widest(logits.device)  # which holds ids
    found = torch.cat([column.to(wide) for column in columns], dim=1).tolist()
    if not all(math.isfinite(row[1]) for row in found):
        raise FloatingPointError("the model's logits are not finite; its weights are damaged")
    by_model = sampled + [False] * len(echoed)
    tokens = [token_of(*row) for row in zip(found, of_rows, by_model, strict=True)]
    return tokens[: len(requests)], tokens[len(requests) :]


def token_of(row: list[float], request: Request, sampled: bool) -> Token:
    """A token from what the device found of it: id, sum of logits, and with log-probabilities its own, the
    likeliest ids, and theirs.
    """
    token = int(row[0])
    if not request.scores:
        return Token(token, sampled, None)
    most, count = (len(row) - 3) // 2, request.logprobs or 0
    ids, logprobs = row[3 : 3 + most], row[3 + most :]
    return Token(token, sampled, row[2], tuple(zip(map(int, ids[:count]), logprobs[:count], strict=True)))
