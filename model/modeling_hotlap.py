"""A GPT trained by hotlap, for Transformers (5.8 or later): its configuration and its model, in one file.

`hotlap export hf` puts this file beside the weights of models that no class of Transformers can hold:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A decoder-only transformer with rotary positions, QK-norm, parameter-free RMSNorm and ReLU^2. Its extras are
each behind a field of `HotlapConfig`: attention windows by layer, bigrams, value embeddings, residual
scalars, smear, backout, and a softcap of the logits. Weights have hotlap's names after "model.", but for the
head, which is `lm_head` here. Needs torch and transformers, and not hotlap.

MIT License. Copyright (c) the authors of hotlap.
"""
# B batch, T new tokens, S tokens in the cache and new ones, D width, H heads, K key-value heads, C head dim

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

GATE_CHANNELS = 12  # channels of the residual stream that the gate of a value embedding reads
SMEAR_CHANNELS = 24  # those that the gate of smear reads
# what Transformers calls the cache since 5.24, and before
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HotlapConfig(PreTrainedConfig):
    model_type = "hotlap"

    vocab_size: int = 32768
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    head_dim: int = 128
    max_position_embeddings: int = 2048
    rope_theta: float = 100_000.0
    rms_norm_eps: float = 1e-6
    layer_types: list[str] | None = None  # "full_attention" or "sliding_attention" for each layer
    sliding_window: int | None = None  # keys that a query of a sliding layer sees, its own included
    qk_gain: float = 1.2  # factor on queries and keys after QK-norm
    bigram_rows: int = 0  # of a hashed table of bigrams; 0: none
    value_embeddings: bool = True  # in every other layer, the last one included
    residual_scalars: bool = True
    smear: bool = True
    backout: bool = True
    final_logit_softcapping: float | None = 15.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def value_embedding_layers(self) -> range:
        layers = self.num_hidden_layers
        return range((layers - 1) % 2, layers, 2) if self.value_embeddings else range(0)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), computed in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_tables(position_ids: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of the positions (B, T), each (B, T, C / 2) in float32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angle = position_ids[..., None].float() * base ** (-channel / head_dim)
    return angle.cos(), angle.sin()


def norm_rotary(x: torch.Tensor, rotary: tuple[torch.Tensor, ...], gain: float, eps: float) -> torch.Tensor:
    """QK-norm, gain, and rotation by minus the angle, of (B, T, H, C). In float32, rounded once."""
    a, b = (gain * rms_norm(x.float(), eps)).chunk(2, dim=-1)
    cos, sin = (table.unsqueeze(2) for table in rotary)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention (B, T, H, C) and its weights (B, H, T, S), of (B, H, T, C) and twice (B, K, S, C)."""
    key, value = (y.repeat_interleave(module.num_key_value_groups, dim=1) for y in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class HotlapAttention(nn.Module):
    is_causal = True

    def __init__(self, config: HotlapConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        width = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=False)
        self.proj = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)
        self.value_gate = None
        if layer_idx in config.value_embedding_layers:
            self.value_gate = nn.Linear(GATE_CHANNELS, self.kv_heads, bias=False)

    def forward(self, x, value_embedding, rotary, attention_mask, cache=None, **kwargs):
        """x: (B, T, D); value_embedding: (B, T, K C) or None. Returns (B, T, D) and the weights, if any."""
        c, (B, T, _) = self.config, x.shape
        qkv = self.qkv(x).view(B, T, -1, c.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.value_gate is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :GATE_CHANNELS]).float())
            added = gate.unsqueeze(-1) * value_embedding.view(v.shape).float()
            v = (v.float() + added).to(v.dtype)
        q, k = (norm_rotary(y, rotary, c.qk_gain, c.rms_norm_eps) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(c._attn_implementation, eager_attention_forward)
        options = kwargs | {"scaling": c.head_dim**-0.5, "sliding_window": self.sliding_window}
        attended, weights = attend(self, q, k, v, attention_mask, **options)
        return self.proj(attended.reshape(B, T, -1)), weights


class HotlapMLP(nn.Module):
    def __init__(self, config: HotlapConfig):
        super().__init__()
        self.fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class HotlapBlock(GradientCheckpointingLayer):
    def __init__(self, config: HotlapConfig, layer_idx: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attention = HotlapAttention(config, layer_idx)
        self.mlp = HotlapMLP(config)

    def forward(self, x, value_embedding, rotary, attention_mask, cache=None, **kwargs):
        y = rms_norm(x, self.eps)
        x = x + self.attention(y, value_embedding, rotary, attention_mask, cache=cache, **kwargs)[0]
        return x + self.mlp(rms_norm(x, self.eps))


class HotlapPreTrainedModel(PreTrainedModel):
    config: HotlapConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ["HotlapBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": HotlapBlock, "attentions": HotlapAttention}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """For training from scratch: scalars start as if their extras were not there."""
        super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("_scale"):
                init.constant_(parameter, float(name == "residual_scale"))


class HotlapModel(HotlapPreTrainedModel):
    def __init__(self, config: HotlapConfig):
        super().__init__(config)
        layers, kv_width = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(HotlapBlock(config, i) for i in range(layers))
        self.value_embeddings = nn.ModuleDict(
            {str(i): nn.Embedding(config.vocab_size, kv_width) for i in config.value_embedding_layers}
        )
        if config.bigram_rows:
            self.bigrams = nn.Embedding(config.bigram_rows, config.hidden_size)
        if config.residual_scalars:
            self.residual_scale = nn.Parameter(torch.ones(layers))
            self.x0_scale = nn.Parameter(torch.zeros(layers))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_scale = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """The normalised residual stream (B, T, D) that the head reads. ValueError without ids."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(
                "give input_ids, not inputs_embeds: bigrams, smear and value embeddings need ids"
            )
        c, cache = self.config, (past_key_values if cache is None else cache)
        if use_cache and cache is None:
            cache = DynamicCache(config=c)
        if position_ids is None:
            position_ids = positions_of(input_ids, attention_mask, cache)
        x = rms_norm(self.embedding(input_ids), c.rms_norm_eps)
        masks = attention_mask
        if not isinstance(masks, dict):  # which `generate` may have made
            makers = {"full_attention": create_causal_mask}
            makers |= {"sliding_attention": create_sliding_window_causal_mask}
            given = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
            masks = {kind: makers[kind](config=c, inputs_embeds=x, **given) for kind in {*c.layer_types}}
        if c.smear or c.bigram_rows:
            before = self.ids_before(input_ids, position_ids, cache)
        if c.smear:
            x = self.smeared(x, before)
        if c.bigram_rows:
            pairs = (input_ids.long() * 0x9E3779B1 + before.long() * 0x85EBCA77) % c.bigram_rows
            x = rms_norm(x + self.bigrams(pairs), c.rms_norm_eps)
        rotary = rotary_tables(position_ids, c.head_dim, c.rope_theta)
        x0, middle = x, None
        for i, block in enumerate(self.blocks):
            if c.residual_scalars:
                x = self.residual_scale[i] * x + self.x0_scale[i] * x0
            values = self.value_embeddings[str(i)](input_ids) if i in c.value_embedding_layers else None
            x = block(x, values, rotary, masks[c.layer_types[i]], cache=cache, **kwargs)
            if c.backout and i == c.num_hidden_layers // 2:
                middle = x
        if c.backout:
            x = x - self.backout_scale * middle
        return BaseModelOutputWithPast(last_hidden_state=rms_norm(x, c.rms_norm_eps), **{CACHE: cache})

    def smeared(self, x, before):
        """x (B, T, D), with a gated share of the token before (B, T), if there is one, added to each."""
        previous = rms_norm(self.embedding(before.clamp(min=0)), self.config.rms_norm_eps)
        gate = self.smear_scale * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * previous * (before >= 0).unsqueeze(-1)

    def ids_before(self, input_ids, position_ids, cache):
        """The id before each (B, T), -1 for the first, at position 0.

        The cache gets one layer more, whose keys are the ids: what repeats, reorders or crops a cache does so
        to them.
        """
        if self.config._attn_implementation == "vllm" or not isinstance(cache, Cache | None):
            raise ValueError(
                "smear and bigrams need the token before each, which engines that batch rows of their own, "
                "such as vLLM and generate_batch(), do not keep; call generate(), or train without them"
            )
        whole = input_ids
        if cache is not None:
            layer = self.config.num_hidden_layers
            if len(cache.layers) == layer:
                cache.layers.append(DynamicLayer())
            keys = input_ids[:, None, :, None]
            whole = cache.update(keys, keys[..., :0], layer)[0][:, 0, :, 0]  # (B, S)
        before = F.pad(whole, (1, 0))[:, -input_ids.shape[1] - 1 : -1]
        return before.masked_fill(position_ids == 0, -1)


def positions_of(input_ids, attention_mask, cache) -> torch.Tensor:
    """Positions (B, T), or (1, T) without a mask (B, S), which says where the padding ends."""
    T = input_ids.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    past = cache.get_seq_length() if cache is not None else 0
    return torch.arange(past, past + T, device=input_ids.device)[None]


class HotlapForCausalLM(HotlapPreTrainedModel, GenerationMixin):
    def __init__(self, config: HotlapConfig):
        super().__init__(config)
        self.model = HotlapModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits in float32, and with labels (B, T), -100 where there is none, the mean loss in nats."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        given |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache, "past_key_values": past_key_values}
        outputs = self.model(input_ids, **given, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        if softcap := self.config.final_logit_softcapping:
            logits = softcap * torch.tanh(logits / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        recorded = {name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **recorded)
