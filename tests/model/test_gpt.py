"""The model: causality, windows, documents, the cache, and every option."""

import copy
import dataclasses

import pytest
import torch
from helpers.cached import cached_logits, continued
from helpers.tools import relative_error, tiny_config

from hotlap.kernels import decode_linear, dispatch, fp8
from hotlap.model.config import ROPE_BASE
from hotlap.model.gpt import GPT, Block
from hotlap.model.kv_cache import KVCache


def ids_of(B, T, seed=0, vocab=320):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


CONFIGS = {
    "all extras": tiny_config(layers=3, bigram_rows=5000),
    "no extras": tiny_config(
        value_embeddings=False, residual_scalars=False, smear=False, backout=False, softcap=0.0
    ),
    "windows and grouped heads": tiny_config(layers=4, context=300, heads=2, kv_heads=1, qk_gain=1.0),
}


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def naive_logits(model, ids):
    """nanochat's formulas for one row of tokens, in float64, head by head and query by query."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    T, C = len(ids), c.head_dim
    angle = torch.arange(T).double()[:, None] * ROPE_BASE ** (-torch.arange(0, C, 2).double() / C)
    turn = torch.polar(torch.ones_like(angle), -angle)

    def rotated(x):
        turned = torch.complex(*(c.qk_gain * norm(x)).chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = norm(w["embedding.weight"][ids])
    if c.smear:
        gate = w["smear_scale"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + gate * x[:-1]))
    if c.bigram_rows:
        pairs = zip(ids.tolist(), [-1, *ids.tolist()[:-1]], strict=True)
        rows = [(id * 0x9E3779B1 + before * 0x85EBCA77) % c.bigram_rows for id, before in pairs]
        x = norm(x + w["bigrams.weight"][rows])
    x0 = x
    for i, window in enumerate(c.windows):
        if c.residual_scalars:
            x = w["residual_scale"][i] * x + w["x0_scale"][i] * x0
        y = norm(x)
        qkv = (y @ w[f"blocks.{i}.attention.qkv.weight"].T).split(C, -1)
        heads = []
        for h in range(c.heads):
            kv = h * c.kv_heads // c.heads
            q, k = rotated(qkv[h]), rotated(qkv[c.heads + kv])
            v = qkv[c.heads + c.kv_heads + kv]
            if i in c.value_embedding_layers:
                gate = 3 * torch.sigmoid(y[:, :12] @ w[f"blocks.{i}.attention.value_gate.weight"][kv])
                v = v + gate[:, None] * w[f"value_embeddings.{i}.weight"][ids][:, kv * C : (kv + 1) * C]
            seen = [slice(max(0, t - window + 1), t + 1) for t in range(T)]
            heads.append(torch.stack([(k[s] @ q[t] / C**0.5).softmax(0) @ v[s] for t, s in enumerate(seen)]))
        x = x + torch.cat(heads, -1) @ w[f"blocks.{i}.attention.proj.weight"].T
        inner = (norm(x) @ w[f"blocks.{i}.mlp.fc.weight"].T).clamp(min=0) ** 2
        x = x + inner @ w[f"blocks.{i}.mlp.proj.weight"].T
        if i == c.layers // 2:
            middle = x
    if c.backout:
        x = x - w["backout_scale"] * middle
    logits = norm(x) @ w["head.weight"].T
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_its_formulas(name, random_model):
    model = random_model(CONFIGS[name])
    ids = ids_of(1, min(200, CONFIGS[name].context))
    with torch.no_grad():
        assert relative_error(model(ids)[0], naive_logits(model, ids[0])) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_a_cached_forward_is_the_full_forward(name, chunk, random_model):
    model, config = random_model(CONFIGS[name]), CONFIGS[name]
    T = 63 if config.context == 64 else 210
    ids = ids_of(1, T)
    cache = KVCache(config, 1, T, torch.float32, "cpu")
    pieces = []
    with torch.inference_mode():
        for start in range(0, T, chunk):
            pieces.append(cached_logits(model, cache, ids, [0], [start], min(chunk, T - start)))
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-5, atol=1e-4)


def test_slots_of_different_lengths_continue_in_any_order(random_model):
    config = tiny_config(layers=3)
    model, ids = random_model(config), ids_of(4, 40)
    cache, done = KVCache(config, 4, 40, torch.float32, "cpu"), [0, 0, 0, 0]
    script = [([2], 5), ([0], 17), ([1, 2], 3), ([3], 1), ([3, 0, 1], 4), ([2, 1, 0, 3], 1), ([1, 3], 7)]
    with torch.inference_mode():
        full = model(ids)
        for slots, new in script:
            y = cached_logits(model, cache, ids[slots], slots, [done[s] for s in slots], new)
            for row, s in enumerate(slots):
                expected = full[s, done[s] : done[s] + new]
                torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-4)
                done[s] += new


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_decoding_says_the_same_tokens_as_torch(name, random_model, choose_kernels, monkeypatch):
    """Of two sequences, by the kernels in the interpreter. Each layer has four products, all fused."""
    if not dispatch.INTERPRETED:
        pytest.skip("runs kernels on a CPU")
    config, products, steps = CONFIGS[name], [], 3
    model = random_model(config).for_inference()
    fused = decode_linear._decode_linear
    monkeypatch.setattr(
        decode_linear, "_decode_linear", lambda *given: products.append(given) or fused(*given)
    )

    def answer(kernels):
        choose_kernels(kernels)
        cache, slots, logits = KVCache(config, 2, 12, torch.float32, "cpu"), torch.arange(2), []
        ids, before = ids_of(2, 9), 0 * slots - 1
        for step in range(steps + 1):  # the first reads prompts of 18 tokens, which are too many
            flat = continued(cache, ids, slots, 0 * slots + (8 + step if step else 0), before)
            logits.append(model(flat, cache=cache)[0].unflatten(0, ids.shape)[:, -1])
            before, ids = ids[:, -1], logits[-1].argmax(-1, keepdim=True)
        return torch.stack(logits)

    with torch.inference_mode():
        expected = answer("torch")
        assert not products
        logits = answer("triton")
    assert len(products) == 4 * config.layers * steps
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_later_token_changes_nothing_before_it(name, random_model):
    model, ids = random_model(CONFIGS[name]), ids_of(1, 60)
    other = ids.clone()
    other[0, 30] = (other[0, 30] + 1) % 320
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert torch.equal(before[:, :30], after[:, :30])
    assert (before[:, 30:] != after[:, 30:]).any(-1).all()


def test_a_short_window_forgets_what_is_further_back(random_model):
    """One layer would be long, so there are two; of what the first sees, nothing reaches past its window."""
    config = tiny_config(context=512, window_pattern="S", smear=False)
    model, ids = random_model(config), ids_of(1, 200)
    other = ids.clone()
    other[0, 0] += 1
    seen = []
    model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(output))
    with torch.no_grad():
        model(ids), model(other)
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten()
    assert changed.tolist() == list(range(128))  # the short window of a context of 512


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_have_the_losses_of_each_alone(name, random_model):
    model = random_model(CONFIGS[name])
    lengths = [1, 20, 8, 30]
    documents = [ids_of(1, n + 1, seed=i) for i, n in enumerate(lengths)]
    begin = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    with torch.no_grad():
        alone = torch.cat([model(d[:, :-1], d[:, 1:], reduction="none") for d in documents])
        inputs, targets = (torch.cat([d[:, s] for d in documents], 1) for s in (slice(-1), slice(1, None)))
        packed = model(inputs, targets, reduction="none", document_start=torch.tensor([begin]))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


CHANGES = {
    "context": 1024, "layers": 4, "width": 128, "heads": 1, "kv_heads": 2, "vocab_size": 640,
    "window_pattern": "L", "document_masks": False, "qk_gain": 1.0, "bigram_rows": 100,
    "value_embeddings": False, "residual_scalars": False, "smear": False, "backout": False, "softcap": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(tiny_config())])
def test_every_field_of_the_configuration_changes_the_function(field, random_model):
    base = tiny_config(context=512, layers=3, kv_heads=1, window_pattern="S")
    changed = dataclasses.replace(base, **{field: CHANGES[field]})
    ids, start = ids_of(1, 300), (torch.arange(300)[None] >= 20) * 20  # a short document and a long one
    with torch.no_grad():
        one, model = random_model(base), random_model(changed)
        same = {
            n: p
            for n, p in one.state_dict().items()
            if n in model.state_dict() and p.shape == model.state_dict()[n].shape
        }
        model.load_state_dict(same, strict=False)  # what differs is then the field, and not the dice
        a, b = (model(ids, document_start=start) for model in (one, model))
    assert a.shape != b.shape or relative_error(b, a.double()) > 1e-3


def test_a_model_made_on_meta_is_the_model_made_here():
    config = tiny_config()
    with torch.device("meta"):
        model = GPT(config)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu").init_weights(7)
    direct = GPT(config).init_weights(7)
    for (name, one), (_, other) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*direct.named_parameters(), *direct.named_buffers()],
        strict=True,
    ):
        assert torch.equal(one, other), name


def test_initial_weights_are_a_function_of_the_seed():
    config = tiny_config()
    torch.manual_seed(1)
    one = GPT(config).init_weights(3).state_dict()
    torch.manual_seed(2)
    other = GPT(config)
    before = torch.get_rng_state()
    assert all(torch.equal(one[n], t) for n, t in other.init_weights(3).state_dict().items())
    assert not torch.equal(one["embedding.weight"], other.init_weights(4).embedding.weight)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


def test_initial_weights_have_the_scales_of_nanochat():
    model = GPT(tiny_config(width=128, heads=4, kv_heads=4, bigram_rows=10)).init_weights()
    w = {name: p.detach() for name, p in model.named_parameters()}
    for name, std in (
        ("embedding.weight", 0.8), ("head.weight", 0.001), ("blocks.0.attention.qkv.weight", 128**-0.5),
        ("blocks.0.mlp.fc.weight", 0.4 * 128**-0.5), ("value_embeddings.1.weight", 128**-0.5),
    ):  # fmt: skip
        assert w[name].std() == pytest.approx(std, rel=0.02), name
    assert not w["blocks.0.attention.proj.weight"].any() and not w["blocks.1.mlp.proj.weight"].any()
    assert w["residual_scale"].tolist() == pytest.approx([1.15, 1.05])
    assert w["x0_scale"].tolist() == pytest.approx([0.20, 0.05])
    assert not w["bigrams.weight"].any()
    assert w["smear_scale"].item() == 0 and w["backout_scale"].item() == pytest.approx(0.2)


def test_logits_are_capped_and_their_loss_is_the_loss(random_model):
    model, ids = random_model(tiny_config(softcap=2.0)), ids_of(2, 30)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    logits = model(ids)
    assert logits.dtype == torch.float32 and logits.abs().max() <= 2
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(model(ids, targets, reduction="mean"), expected)
    torch.testing.assert_close(model(ids, targets), expected * 58)


def test_bfloat16_computes_almost_what_float32_does(random_model):
    config, ids = tiny_config(layers=3), ids_of(2, 60)
    with torch.no_grad():
        exact = random_model(config)(ids)
        model = random_model(config, compute_dtype=torch.bfloat16)
        assert model.hidden(ids).dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert relative_error(model(ids), exact.double()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_for_inference_give_the_same_bits_from_less_memory(name, dtype, random_model):
    """But for a step of few tokens, whose fused products need rounded weights."""
    model, ids = random_model(CONFIGS[name], compute_dtype=dtype), ids_of(2, 50)
    generator = torch.Generator().manual_seed(1)

    def results():
        cache = KVCache(CONFIGS[name], 2, 50, dtype, "cpu")
        yield cached_logits(model, cache, ids, [0, 1], [0, 0], 49)
        yield model(ids)
        yield model(ids, ids.roll(-1, 1), reduction="none")
        yield cached_logits(model, cache, ids, [0, 1], [49, 49], 1)

    with torch.no_grad():
        for parameter in model.parameters():  # of scalars too, that rounding changes
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        *before, step = results()
        size = sum(p.nbytes for p in model.parameters())
        assert model.for_inference() is model
        *after, fused = results()
        assert all(map(torch.equal, after, before))
        torch.testing.assert_close(
            fused, step, rtol=0, atol=8 * torch.finfo(dtype).eps * step.abs().max().item()
        )
    assert sum(p.nbytes for p in model.parameters()) == size * dtype.itemsize // 4
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_is_the_one_with_rounded_weights(name, dtype, random_model):
    """In prompts, whose products torch computes, in decoding, and in the loss."""
    model = copy.deepcopy(random_model(CONFIGS[name], compute_dtype=dtype).for_inference())
    rounded = copy.deepcopy(model)
    size = sum(p.nbytes for p in model.blocks.parameters())
    assert model.quantize() is model
    assert sum(p.nbytes for p in model.blocks.parameters()) < 1.1 * size / dtype.itemsize
    for own, other in zip(model.modules(), rounded.modules(), strict=True):
        if getattr(own, "scales", None) is not None:
            other.weight.copy_(own.whole(dtype))
    ids = ids_of(2, 50)
    with torch.no_grad():
        for one, exact in (
            (model(ids), rounded(ids)),
            (model(ids, ids.roll(-1, 1)), rounded(ids, ids.roll(-1, 1))),
            [decoded(m, CONFIGS[name], ids) for m in (model, rounded)],
        ):
            assert relative_error(one, exact.double()) < (1e-5 if dtype == torch.float32 else 0.03)


def decoded(model, config, ids):
    """Logits of the last of the tokens, after the others were read."""
    cache = KVCache(config, 2, 50, model.compute_dtype, "cpu")
    cached_logits(model, cache, ids, [0, 1], [0, 0], 49)
    return cached_logits(model, cache, ids, [0, 1], [49, 49], 1)


def test_every_parameter_learns(random_model):
    model, ids = random_model(tiny_config(layers=3)), ids_of(2, 30)  # of two layers, backout would only scale
    model(ids, ids.roll(-1, 1)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_too_long_a_sequence_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"65 tokens .* context of 64"):
        GPT(tiny_config()).init_weights()(ids_of(1, 65))


def test_a_compiled_block_is_the_eager_one(random_model):
    config = tiny_config(layers=1)
    model = random_model(config)
    generator = torch.Generator().manual_seed(0)
    x, x0, embedding = (torch.randn(2, 64, 64, generator=generator) for _ in range(3))
    mix = torch.tensor(1.1), torch.tensor(0.2), x0
    arguments = (x, mix, embedding, model.cos, model.sin, None, None)
    block: Block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), block(*arguments), rtol=1e-4, atol=1e-4)


def test_fp8_is_for_large_layers_while_training_and_stays_near_bfloat16(random_model, monkeypatch):
    config = tiny_config(layers=2)
    assert random_model(config).use_fp8() == 0  # all are small
    monkeypatch.setattr(fp8, "SMALLEST", 1)
    model, ids = random_model(config, compute_dtype=torch.bfloat16), ids_of(2, 32)
    with torch.no_grad():
        before = model(ids)
    loss = model(ids, ids.roll(-1, 1), reduction="mean")
    gradient = torch.autograd.grad(loss, model.blocks[0].mlp.fc.weight)[0]
    assert model.use_fp8() == 2 * 4  # qkv, projection, and the two of the MLP
    loss8 = model(ids, ids.roll(-1, 1), reduction="mean")
    gradient8 = torch.autograd.grad(loss8, model.blocks[0].mlp.fc.weight)[0]
    assert 0 < relative_error(loss8, loss) < 0.02 and 1e-4 < relative_error(gradient8, gradient) < 0.2
    with torch.no_grad():
        assert torch.equal(model(ids), before)
