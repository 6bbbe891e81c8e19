"""Generation on several ranks that share a sharded model."""

import torch
from helpers.tools import tiny_config, train_tiny_tokenizer
from torch.distributed.tensor import DTensor

from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling
from hotlap.train.distributed.sharding import parallelize
from hotlap.train.distributed.world import World

PROMPTS = (("", "The quick brown fox", "dog", "2 + 3"), ("What is 12 * 12?",))  # of each rank


def whole_and_sharded_answers(world: World) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy answers to this rank's prompts from a whole model, and from the same model sharded."""
    tokenizer, sampling = train_tiny_tokenizer(), Sampling(temperature=0.0, max_tokens=12 + world.rank)
    prompts = [[tokenizer.bos, *tokenizer.encode(text)] for text in PROMPTS[world.rank]]
    model = GPT(tiny_config(layers=3)).init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.normal_(0, 0.2, generator=generator)
        model.head.weight.normal_(0, 0.2, generator=generator)
    whole = Engine(model, tokenizer).complete(prompts, sampling)
    parallelize(model, world, "none", compile=False)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    engine = Engine(model, tokenizer, slots=2)
    requests = [engine.add(prompt, sampling) for prompt in prompts]
    while world.total(engine.busy)[0]:
        engine.step()
    ids = torch.tensor([tokenizer.encode("The dog does not mind.")])
    model(ids[:, :-1], ids[:, 1:]).backward()  # weights gathered while generating can be trained
    return whole, [request.answer for request in requests]
