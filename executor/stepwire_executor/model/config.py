"""What a decoder of the Llama family looks like, whatever file format says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by a factor. Chen et al. 2023."""

    factor: float
    """Trained context times this is the new context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long wavelengths are stretched, short ones kept, those between interpolated. Llama 3.1."""

    factor: float
    """Stretch of the longest wavelengths."""
    low_freq_factor: float
    """Wavelengths above original_max_position_embeddings / this are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / this are kept."""
    original_max_position_embeddings: int
    """Context before the stretch, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Interpolation by wavelength with a temperature on attention. Peng et al. 2023."""

    factor: float
    """Stretch of the wavelengths that never complete a turn."""
    original_max_position_embeddings: int
    """Context before the stretch, in tokens."""
    attention_factor: float
    """Multiplies cosines and sines, so attention scores by its square."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context are kept."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are stretched in full."""
    truncate: bool = True
    """Whether the bounds between the two are rounded to whole dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyFactors:
    """A divisor for each frequency, as GGUF files store the Llama 3.1 scheme."""

    factors: tuple[float, ...]
    """rotary_dim / 2 divisors."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Su et al. 2021."""

    theta: float
    """Base of the geometric row of frequencies."""
    rotary_dim: int
    """Leading elements of a head that are rotated; even."""
    scaling: RopeScaling | None = None
    """How a longer context than the trained one is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A pre-norm decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU."""

    architecture: str
    """"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM" or "Qwen3ForCausalLM"."""
    vocab_size: int
    """Rows of the embedding table and of the head."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the MLP."""
    num_layers: int
    num_heads: int
    """Query heads a layer."""
    num_kv_heads: int
    """Key and value heads a layer; divides num_heads."""
    head_dim: int
    """Width of a head; need not be hidden_size / num_heads."""
    rms_norm_eps: float
    max_position_embeddings: int
    """The model's context in tokens."""
    rope: RopeConfig
    tie_word_embeddings: bool
    """The head is the embedding table."""
    attention_bias: bool
    """Query, key and value projections have a bias."""
    attention_output_bias: bool
    """The attention's output projection has a bias."""
    mlp_bias: bool
    """The MLP's projections have a bias."""
    qk_norm: bool
    """Query and key heads are normalised before rotation."""
    sliding_windows: tuple[int | None, ...]
    """For each layer: tokens a query sees, itself included; None is all."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence, most usual first."""
    bos_token_id: int | None
    checkpoint_dtype: str | None
    """"float32", "bfloat16" or "float16" as the config says; None where it does not."""

    @property
    def query_size(self) -> int:
        """Elements of all query heads of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of all key heads of a token, or of all value heads."""
        return self.num_kv_heads * self.head_dim
