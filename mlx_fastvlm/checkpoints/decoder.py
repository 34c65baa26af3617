"""Read FastVLM's decoder and projector from a source checkpoint, float or quantised."""

import warnings

import mlx.core as mx

from mlx_mobileclip.checkpoints.source import Source
from mlx_mobileclip.errors import CheckpointError
from mlx_mobileclip.json_fields import Fields
from mlx_mobileclip.quantization import Quantization, dequantize

from ..models.config import FastVLMConfig


class SourceQuantization:
    """The `quantization` entry of a source's config.json, in mlx-lm's form."""

    def __init__(self, fields: Fields):
        """Find the entry in a config.json."""
        key = next((k for k in ("quantization", "quantization_config") if fields.has(k)), None)
        self._fields = fields.object(key) if key else None

    def of_layer(self, path: str) -> Quantization:
        """Return the quantisation of the source's layer `path`."""
        if self._fields is None:
            raise CheckpointError(
                f"{path} has scales, but config.json does not say how it is quantised; "
                'add "quantization": {"group_size": ..., "bits": ...}'
            )
        override = self._fields.values.get(path)
        values = {k: self._fields.values.get(k) for k in ("bits", "group_size", "mode")}
        if isinstance(override, dict):
            values |= override
        return Quantization.from_json(Fields(values, f"{self._fields.where}: {path}"))


class DecoderReader:
    """Reads decoder and projector from a source and records the quantisation of each layer."""

    def __init__(self, source: Source, config: FastVLMConfig, quantizations: SourceQuantization):
        """Read the decoder and projector that `config` describes from `source`."""
        self.source = source
        self.config = config.text
        self.features, self.projector_depth = config.vision.features, config.projector_depth
        self.quantizations = quantizations
        self.quantized: dict[str, Quantization] = {}
        self._head: dict[str, mx.array] = {}
        self._embedding: dict[str, mx.array] = {}

    def layers(self) -> dict[str, mx.array]:
        """Canonical tensors of the decoder's layers and final norm."""
        c, out = self.config, dict[str, mx.array]()
        D, kv_width = c.hidden_size, c.num_key_value_heads * c.head_dim
        for i in range(c.num_hidden_layers):
            widths = (D, kv_width, kv_width)
            src, dst = f"model.layers.{i}", f"language_model.layers.{i}"
            qkv = [(f"{src}.self_attn.{n}_proj", w) for n, w in zip("qkv", widths, strict=True)]
            out |= self._linear(f"{dst}.self_attn.qkv_proj", qkv, D, bias=True)
            out |= self._linear(f"{dst}.self_attn.o_proj", [(f"{src}.self_attn.o_proj", D)], D)
            gate_up = [(f"{src}.mlp.{n}_proj", c.intermediate_size) for n in ("gate", "up")]
            out |= self._linear(f"{dst}.mlp.gate_up_proj", gate_up, D)
            down = [(f"{src}.mlp.down_proj", D)]
            out |= self._linear(f"{dst}.mlp.down_proj", down, c.intermediate_size)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"{dst}.{norm}.weight"] = self.source.take(f"{src}.{norm}.weight", (D,))
        out["language_model.norm.weight"] = self.source.take("model.norm.weight", (D,))
        return out

    def vocabulary(self, stored_rows: int) -> dict[str, mx.array]:
        """Canonical embedding and output layer, without the padding in `stored_rows`."""
        rows, D = self.config.vocab_size, self.config.hidden_size
        table = [("model.embed_tokens", stored_rows)]
        embedding = self._linear("language_model.embed_tokens", table, D)
        head: dict[str, mx.array] = {}
        if not self.config.tie_word_embeddings:
            head = self._linear("language_model.lm_head", [("lm_head", stored_rows)], D)
        elif self.source.has("lm_head.weight"):
            self._head = self._linear("lm_head", [("lm_head", stored_rows)], D)
            self._embedding = embedding
            self.quantized.pop("lm_head", None)
        return {name: tensor[:rows] for name, tensor in (embedding | head).items()}

    def warn_if_untied(self) -> None:
        """Warn if the stored output layer differs from the embedding that the config ties it to.

        This reads data, so call it after `Source.finish`: until then, placeholders for missing
        tensors have any size that the config claims.
        """
        head, embedding = self._head, self._embedding
        pairs = list(zip(head.values(), embedding.values(), strict=False))
        same = len(head) == len(embedding) and all(a.shape == b.shape for a, b in pairs)
        if not same or not all(mx.array_equal(a, b).item() for a, b in pairs):
            warnings.warn(
                f"{self.source.where}: lm_head differs from embed_tokens, but config.json ties "
                "them; lm_head is ignored. Set tie_word_embeddings to false to use it",
                stacklevel=2,
            )

    def projector(self) -> dict[str, mx.array]:
        """Canonical tensors of the projector."""
        out: dict[str, mx.array] = {}
        width, inputs = self.config.hidden_size, self.features
        for i in range(self.projector_depth):
            out |= self._linear(f"projector.{i}", [(f"projector.{i}", width)], inputs, bias=True)
            inputs = width
        return out

    def _linear(
        self, dst: str, parts: list[tuple[str, int]], inputs: int, *, bias: bool = False
    ) -> dict[str, mx.array]:
        """Fuse one or more source layers with the same input, each (name, rows)."""
        quantizations = [
            self.quantizations.of_layer(self.source.key(f"{name}.scales").removesuffix(".scales"))
            if self.source.has(f"{name}.scales")
            else None
            for name, _ in parts
        ]
        if len(set(quantizations)) == 1 and quantizations[0] is not None:
            self.quantized[dst] = quantizations[0]
            quantized = [self._quantized(name, n, inputs, quantizations[0]) for name, n in parts]
            out = {f"{dst}.{k}": mx.concatenate([p[k] for p in quantized]) for k in quantized[0]}
        else:  # parts quantised differently cannot share one quantised layer
            floats = [
                self.source.take(f"{name}.weight", (n, inputs))
                if quantization is None
                else dequantize(
                    self._quantized(name, n, inputs, quantization), quantization, mx.float32
                )
                for (name, n), quantization in zip(parts, quantizations, strict=True)
            ]
            out = {f"{dst}.weight": mx.concatenate(floats)}
        if bias:
            biases = [self.source.take(f"{name}.bias", (n,)) for name, n in parts]
            out[f"{dst}.bias"] = mx.concatenate(biases)
        return out

    def _quantized(
        self, name: str, rows: int, inputs: int, quantization: Quantization
    ) -> dict[str, mx.array]:
        if inputs % quantization.group_size:
            raise CheckpointError(
                f"{self.source.where}: {name} is {inputs} wide, not a multiple of the group_size "
                f"{quantization.group_size} in config.json"
            )
        words, groups = inputs * quantization.bits // 32, inputs // quantization.group_size
        affine = quantization.mode == "affine"
        scale_dtypes = {} if affine else {"dtypes": (mx.uint8,)}
        out = {
            "weight": self.source.take(f"{name}.weight", (rows, words), (mx.uint32,)),
            "scales": self.source.take(f"{name}.scales", (rows, groups), **scale_dtypes),
        }
        if affine:
            out["biases"] = self.source.take(f"{name}.biases", (rows, groups))
        return out
