"""The canonical config.json: shapes of the three parts, image settings, maximum length."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_mobileclip.json_fields import Fields
from mlx_mobileclip.models.fastvit import FastViTConfig
from mlx_mobileclip.quantization import QuantizedLayers, quantization_entry, read_quantized_layers

MODEL_TYPE = "mlx_fastvlm"
FORMAT_VERSION = 1
IMAGE_MODES = ("pad", "crop")
RESOLUTIONS = range(128, 1536 + 1, 64)
MAX_LENGTH = 32768  # positions of Qwen2 as published; Apple's models use 8192 of them


@dataclass(frozen=True, slots=True)
class Qwen2Config:
    """Config of the Qwen2 decoder, with Hugging Face's names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, fields: Fields) -> "Qwen2Config":
        """Read and check a `text_config`; raises ConfigError naming the invalid field."""
        config = cls(
            hidden_size=fields.integer("hidden_size", 1, 65536),
            num_hidden_layers=fields.integer("num_hidden_layers", 1, 256),
            num_attention_heads=fields.integer("num_attention_heads", 1, 1024),
            num_key_value_heads=fields.integer("num_key_value_heads", 1, 1024),
            intermediate_size=fields.integer("intermediate_size", 1, 262144),
            vocab_size=fields.integer("vocab_size", 1, 1_000_000),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1),
            rope_theta=fields.number("rope_theta", 1, 1e9),
            max_position_embeddings=fields.integer("max_position_embeddings", 1, 1 << 20),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        )
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if config.hidden_size % heads or config.head_dim % 2:
            raise fields.error("hidden_size", f"cannot be split into {heads} heads of even width")
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"must be a divisor of the {heads} heads")
        return config


@dataclass(frozen=True, slots=True)
class FastVLMConfig:
    """Config of a FastVLM checkpoint.

    Attributes:
        text: The decoder.
        vision: The image tower.
        projector_type: "identity", "linear" or "mlpNx_gelu".
        image_size: Side in pixels that the checkpoint was trained at.
        image_mode: "pad" to a square (Apple's predict.py) or "crop" (Apple's model card).
        max_length: Longest sequence in tokens, images and answer included.
        quantization: Quantisation of each quantised layer, by its path in the model.
        source: Origin of the checkpoint: model, revision, layout.
    """

    text: Qwen2Config
    vision: FastViTConfig
    projector_type: str
    image_size: int
    image_mode: str
    max_length: int
    quantization: QuantizedLayers = field(default_factory=dict)
    source: dict[str, str | None] = field(default_factory=dict)

    @property
    def projector_depth(self) -> int:
        """Number of linear layers in the projector."""
        return projector_depth(self.projector_type)

    def to_json(self) -> dict[str, Any]:
        """Return the contents of the canonical config.json."""
        result = {
            "model_type": MODEL_TYPE,
            "format_version": FORMAT_VERSION,
            "text_config": asdict(self.text),
            "vision_config": self.vision.to_json(),
            "projector_type": self.projector_type,
            "image_size": self.image_size,
            "image_mode": self.image_mode,
            "max_length": self.max_length,
            "source": self.source,
        }
        if self.quantization:
            result["quantization"] = quantization_entry(self.quantization)
        return result

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "FastVLMConfig":
        """Read and check a canonical config.json; raises ConfigError naming the invalid field."""
        fields = Fields(values, where)
        fields.check_version(FORMAT_VERSION)
        config = cls(
            text=Qwen2Config.from_json(fields.object("text_config")),
            vision=FastViTConfig.from_json(fields.object("vision_config")),
            projector_type=fields.string("projector_type"),
            image_size=fields.integer("image_size", RESOLUTIONS.start, RESOLUTIONS.stop - 1),
            image_mode=fields.choice("image_mode", IMAGE_MODES),
            max_length=fields.integer("max_length", 1, 1 << 20),
            quantization=read_quantized_layers(fields),
            source=fields.record("source"),
        )
        if config.image_size not in RESOLUTIONS:
            raise fields.error("image_size", f"is not a multiple of {RESOLUTIONS.step}")
        longest = min(config.text.max_position_embeddings, MAX_LENGTH)
        if config.max_length > longest:
            config = replace(config, max_length=longest)
        if projector_depth(config.projector_type) < 0:
            raise fields.error("projector_type", f"{config.projector_type[:40]!r} is not known")
        if config.projector_depth == 0 and config.vision.features != config.text.hidden_size:
            raise fields.error("projector_type", "identity needs features as wide as the decoder")
        return config


def projector_depth(projector_type: str) -> int:
    """Number of linear layers in a projector of this type; -1 if the type is unknown.

    Source: apple/ml-fastvlm 592b4ad `llava/model/multimodal_projector/builder.py`.
    """
    if projector_type in ("identity", "linear"):
        return int(projector_type == "linear")
    for depth in range(1, 9):
        if projector_type == f"mlp{depth}x_gelu":
            return depth
    return -1
