"""What configures a model, sampling and exports. Imports no torch, so that flags are read at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hotlap.common.checks import at_least, between, positive

HEAD_DIM = 128  # of models built from a depth; the fastest size for attention kernels
ROPE_BASE = 100_000.0  # base of the rotary frequencies
MLP_RATIO = 4  # hidden width of the MLP / width
GATE_CHANNELS = 12  # channels of the residual stream that a value gate reads
SMEAR_CHANNELS = 24
GPT2_BOS = 50256  # <|endoftext|>, which starts a document in GPT-2's vocabulary
HEAD_DIMS = (32, 64, 80, 96, 128, 256)  # supported by the attention kernels
ADDED_FIELDS = {"document_masks", "qk_gain", "bigram_rows"}  # of a GPTConfig, which older files lack
StoredDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a `GPT`. The defaults are nanochat's d12."""

    vocab_size: int = 32768
    """Number of token ids, special tokens included; set from the tokenizer if one is given."""
    context: int = 2048
    """Longest sequence in tokens."""
    layers: int = 12
    """Number of transformer blocks."""
    width: int = 768
    """Size of the residual stream."""
    heads: int = 6
    """Query heads."""
    kv_heads: int = 6
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    window_pattern: str = "SSSL"
    """Attention window of each layer, repeated over the depth: S is a quarter of the context, L all of it.
    The last layer is always L.
    """
    document_masks: bool = True
    """Train each document of a packed row on its own; without, its tokens see the documents before it too."""
    qk_gain: float = 1.2
    """Factor on queries and keys after QK-norm, which sharpens attention."""
    bigram_rows: int = 0
    """Rows of a hashed table of bigrams: the row of each token and the one before is added to the token's
    embedding. 0 turns this off.
    """
    value_embeddings: bool = True
    """Add a gated per-token embedding to the attention values in every other layer."""
    residual_scalars: bool = True
    """Learn a scale per layer for the residual stream and for the token's embedding x0."""
    smear: bool = True
    """Add a gated share of the previous token's embedding to each token's."""
    backout: bool = True
    """Subtract a learned share of the middle layer's residual before the head."""
    softcap: float = 15.0
    """Logits become softcap * tanh(logits / softcap); 0 turns this off."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def short_window(self) -> int:
        """A quarter of the context, rounded up to a multiple of 128, at most the context."""
        return min(self.context, -(-self.context // 4 // 128) * 128)

    @property
    def windows(self) -> tuple[int, ...]:
        """How many keys each layer sees, the query's own included."""
        letters = (self.window_pattern * self.layers)[: self.layers - 1] + "L"
        return tuple(self.short_window if letter == "S" else self.context for letter in letters)

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Every other layer, the last one included."""
        if not self.value_embeddings:
            return ()
        return tuple(i for i in range(self.layers) if i % 2 == (self.layers - 1) % 2)

    def validate(self) -> GPTConfig:
        """Return self, or raise ValueError naming the first field that cannot work."""
        check_types(self)
        at_least(self, 1, "vocab_size", "context", "layers", "width", "heads", "kv_heads")
        check_heads(self)
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern={self.window_pattern!r} may hold only the letters S and L")
        positive(self, "qk_gain")
        at_least(self, 0, "softcap", "bigram_rows", zero="off")
        return self

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int = 32768, context: int = 2048, **fields) -> GPTConfig:
        """nanochat's rule: width 64 per layer, rounded up to a multiple of the head dim 128."""
        heads = -(-depth * 64 // HEAD_DIM)
        shape = {"layers": depth, "width": heads * HEAD_DIM, "heads": heads, "kv_heads": heads}
        return cls(vocab_size=vocab_size, context=context, **(shape | fields)).validate()

    @classmethod
    def from_dict(cls, fields: dict) -> GPTConfig:
        """The inverse of `dataclasses.asdict`; an unknown or missing field is a ValueError that names it.

        Only ADDED_FIELDS may be missing: the models of older files were trained with the defaults.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if {"architectures", "model_type"} & set(fields):
            made = fields.get("model_type") or fields["architectures"]
            raise ValueError(
                f"it is of a model of Transformers ({made}); `hotlap import hf` makes a model of hotlap of it"
            )
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown model field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if missing := sorted(known - set(fields) - ADDED_FIELDS):
            raise ValueError(f"model field {missing[0]!r} is missing")
        return cls(**fields).validate()


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a `GPT2`. The defaults are its smallest size, with 124M parameters."""

    architecture: str = dataclasses.field(default="gpt2", init=False)
    """Tells config.json from that of a `GPT`, which has no such field."""
    vocab_size: int = 50304
    """Rows of the table of tokens: GPT-2's 50,257, our special ones, and padding to a multiple of 64."""
    context: int = 1024
    """Longest sequence in tokens, and number of learned positions."""
    layers: int = 12
    """Number of transformer blocks."""
    width: int = 768
    """Size of the residual stream."""
    heads: int = 12
    """Attention heads."""
    document_masks: bool = False
    """Train each document of a packed row on its own, from the first position on; without, its tokens see the
    documents before it too, and a row has all positions, as in nanoGPT. Imported models have it.
    """

    softcap: ClassVar[float] = 0.0

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def windows(self) -> tuple[int, ...]:
        """How many keys each layer sees, the query's own included: all."""
        return (self.context,) * self.layers

    def validate(self) -> GPT2Config:
        """Return self, or raise ValueError naming the first field that cannot work."""
        check_types(self)
        at_least(self, 1, "vocab_size", "context", "layers", "width", "heads")
        check_heads(self)
        return self

    @classmethod
    def from_dict(cls, fields: dict) -> GPT2Config:
        """The inverse of `dataclasses.asdict`; an unknown or missing field is a ValueError that names it."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown model field {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if missing := sorted(known - set(fields)):
            raise ValueError(f"model field {missing[0]!r} is missing")
        return cls(**{name: value for name, value in fields.items() if name != "architecture"}).validate()


Shape = GPTConfig | GPT2Config


def shape_from(fields: dict) -> Shape:
    """The configuration of either kind of model, from what config.json holds. ValueError for what is none."""
    if (name := fields.get("architecture")) is None:
        return GPTConfig.from_dict(fields)
    if name != "gpt2":
        raise ValueError(f"architecture={name!r} is unknown; hotlap has gpt2, and its own without that field")
    return GPT2Config.from_dict(fields)


def check_types(config: Shape) -> None:
    """Raise ValueError for a field whose value has another type than its default."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{field.name}={value!r} must be of type {kind.__name__}")


def check_heads(config: Shape) -> None:
    """Raise ValueError for heads that do not divide the width into sizes that attention supports."""
    if config.width % config.heads:
        raise ValueError(f"width={config.width} is not a multiple of heads={config.heads}")
    if config.heads % config.kv_heads:
        raise ValueError(f"heads={config.heads} is not a multiple of kv_heads={config.kv_heads}")
    if config.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"width={config.width} / heads={config.heads} gives heads of {config.head_dim}; attention "
            f"supports {', '.join(map(str, HEAD_DIMS))}"
        )


def counts_of(config: Shape) -> dict[str, int]:
    """As `parameter_counts` in flops.py, of a model of this shape, however large, without building it."""
    counts = gpt2_counts(config) if isinstance(config, GPT2Config) else gpt_counts(config)
    return counts | {"matmul": counts["matrices"] + counts["head"], "total": sum(counts.values())}


def gpt2_counts(c: GPT2Config) -> dict[str, int]:
    biases, norms = (5 + MLP_RATIO) * c.width, 4 * c.width  # of a block
    return {
        "matrices": c.layers * c.width * (4 * c.width + 2 * MLP_RATIO * c.width),
        "head": c.vocab_size * c.width,  # which is the table of tokens
        "embeddings": c.context * c.width,
        "scalars": c.layers * (biases + norms) + 2 * c.width,
    }


def gpt_counts(c: GPTConfig) -> dict[str, int]:
    kv = c.kv_heads * c.head_dim
    with_values = -(-c.layers // 2) if c.value_embeddings else 0  # layers
    matrices = c.layers * c.width * (2 * c.width + 2 * kv + 2 * MLP_RATIO * c.width)
    matrices += with_values * min(GATE_CHANNELS, c.width) * c.kv_heads
    matrices += min(SMEAR_CHANNELS, c.width) if c.smear else 0
    return {
        "matrices": matrices,
        "head": c.vocab_size * c.width,
        "embeddings": c.vocab_size * (c.width + with_values * kv) + c.bigram_rows * c.width,
        "scalars": (2 * c.layers if c.residual_scalars else 0) + c.smear + c.backout,
    }


def rotary_bytes(config: Shape) -> int:
    """Bytes of a model's tables of cosines and sines, of which GPT-2 has none."""
    return 0 if isinstance(config, GPT2Config) else 4 * config.context * config.head_dim


@dataclass(frozen=True)
class Sampling:
    """How to sample the next token. Penalties and biases change the logits before the temperature does, then
    top_k, top_p and min_p each leave out unlikely tokens.
    """

    temperature: float = 0.7
    """0 takes the most likely token."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0: from all."""
    max_tokens: int = 256
    """Maximum length of an answer in tokens; 0 only reads the prompt."""
    seed: int = 0
    """Seed of the random generator."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    min_p: float = 0.0
    """Leave out tokens with less than this share of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens in prompt and answer by this, and multiply negative ones by it."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens in the answer."""
    frequency_penalty: float = 0.0
    """Subtract this for each time that a token is in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, and what to add to their logits."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; it does not include them."""

    def validate(self) -> Sampling:
        between(self, 0, 10, "temperature")
        at_least(self, 0, "top_k", zero="off")
        at_least(self, 0, "max_tokens", "seed")
        between(self, 0, 1, "top_p", "min_p")
        between(self, 0.01, 100, "repetition_penalty")
        between(self, -2, 2, "presence_penalty", "frequency_penalty")
        if not all(abs(bias) <= 100 for _, bias in self.logit_bias):
            raise ValueError("logit_bias must have numbers from -100 to 100")
        if "" in self.stop:
            raise ValueError("stop must have no empty string")
        return self


@dataclass(frozen=True)
class ExportConfig:
    """Write a model directory with config.json, tokenizer.json and model.safetensors. Adapters are merged."""

    model_field: ClassVar[str] = "model"
    model: Path = Path("runs/tiny/sft")
    """Run, checkpoint or model directory."""
    out: Path = Path("exported")
    """Folder to write; it must be empty or not exist yet."""


@dataclass(frozen=True)
class AdapterExportConfig(ExportConfig):
    """Write the adapters of a run with --lora-rank as PEFT's adapter_config.json and
    adapter_model.safetensors.
    """


@dataclass(frozen=True)
class HfExportConfig(ExportConfig):
    """Write a model for Transformers, as its Apertus or, with a softcap, as its NanoChat. Models with other
    extras get a class of their own, a file that Transformers has to be allowed to run; those of the presets
    *-portable need none.
    """

    dtype: StoredDtype = "float32"
    """Of the weights in the file. bfloat16 halves it, and rounds."""


@dataclass(frozen=True)
class GGUFExportConfig(ExportConfig):
    """Write one file for llama.cpp and what is built on it. Adapters are merged; models with extras that
    llama.cpp does not have are refused.
    """

    out: Path = Path("model.gguf")
    """File to write; it must not exist yet."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """Of the weights in the file; q8_0 has 8 bits, and a scale for each 32. Norms stay in f32."""


@dataclass(frozen=True)
class ImportConfig:
    """Turn a model of Transformers into a model directory of ours, for chat, eval, sft and serve."""

    model_field: ClassVar[str] = "model"
    model: Path = Path("model")
    """Folder with config.json, a tokenizer, and .safetensors files."""
    out: Path = Path("imported")
    """Folder to write; it must be empty or not exist yet."""
    context: int | None = None
    """A shorter context, in tokens; a GPT-2 loses the positions beyond, and attention windows must fit."""

    def validate(self) -> ImportConfig:
        if self.context is not None:
            at_least(self, 1, "context")
        return self
