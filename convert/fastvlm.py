"""FastVLM checkpoints of every known layout, read as canonical config and tensors.

Layouts differ in names, in the order of convolution axes, and in what they leave out. A layout
is data: how it names the parts that the common names (timm's tower, Hugging Face's decoder)
stand for. Source of the maps: apple/ml-fastvlm 592b4ad `llava/model`, transformers 5.23
`models/fast_vlm/convert_fastvlm_weights_to_hf.py`, mlx-vlm 0.7.10 `models/fastvlm`.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_fastvlm.config import MODEL_TYPE, FastVLMConfig, Quantization, Qwen2Config
from mlx_mobileclip.checkpoint import Fields, read_json, read_tensors
from mlx_mobileclip.errors import CheckpointError, ConfigError
from mlx_mobileclip.fastvit import PRESETS, FastViTConfig
from mlx_mobileclip.hub import Checkpoint

from .apple import apple_tower_name, network_indices
from .fuse import fold_fastvit
from .source import Source

ROPE_THETA = 1e6  # every FastVLM's; transformers' default of 10000 would be wrong
MAX_POSITIONS = 32768
MAX_LENGTH = 8192
IMAGE_SIZE = 1024
# transformers' converter appends one block of 64 random rows to Qwen2's vocabularies.
PADDED_VOCABULARIES = {152000: 151936, 152128: 152064}
NEVER_USED = r"\.num_batches_tracked$|\.rotary_emb\.inv_freq$|\.head\.(proj|fc\.weight|fc\.bias)$"


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of checkpoints names its tensors.

    Attributes:
        name: For messages and for the record.
        decoder: Stands for "model." in the decoder's names.
        lm_head: The output layer.
        projector: The projector's layers; {i} counts 0, 1, {even} 0, 2, {ordinal} 1, 2.
        vision: Prefix of the tower; empty if the layout has none.
        apple: Whether the tower's names are Apple's rather than timm's.
        stem: Apple's stem; mlx-vlm inserts a level.
        nhwc: Whether convolution weights are (O, H, W, I).
    """

    name: str
    decoder: str
    lm_head: str
    projector: str
    vision: str
    apple: bool = True
    stem: str = "patch_embed."
    nhwc: bool = False


LAYOUTS = (
    Layout(
        name="llava_qwen2",
        decoder="model.",
        lm_head="lm_head",
        projector="model.mm_projector.{even}",
        vision="model.vision_tower.vision_tower.model.",
    ),
    Layout(
        name="fast_vlm",
        decoder="model.language_model.",
        lm_head="lm_head",
        projector="model.multi_modal_projector.linear_{ordinal}",
        vision="model.vision_tower.timm_model.",
        apple=False,
    ),
    Layout(
        name="fast_vlm (before transformers 5)",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="multi_modal_projector.linear_{ordinal}",
        vision="vision_tower.timm_model.",
        apple=False,
    ),
    Layout(
        name="mlx-vlm",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="mm_projector.{even}",
        vision="vision_tower.vision_model.",
        stem="patch_embed.blocks.",
        nhwc=True,
    ),
    Layout(
        name="app export",
        decoder="language_model.model.",
        lm_head="language_model.lm_head",
        projector="multi_modal_projector.linear_{even}",
        vision="",
    ),
)


def convert_fastvlm(
    checkpoint: Checkpoint, values: dict[str, Any], vision_from: Checkpoint | None = None
) -> tuple[FastVLMConfig, dict[str, mx.array]]:
    """Read a source checkpoint as canonical config and lazy canonical tensors.

    Args:
        checkpoint: Where it lies.
        values: Its config.json.
        vision_from: Checkpoint to take the image tower from, if it has none itself.

    Raises:
        CheckpointError: tensors are missing, left over, misshapen or packed unlike the config.
        ConfigError: the config describes no FastVLM.
    """
    fields = Fields(values, str(checkpoint.path / "config.json"))
    _check_kind(fields)
    tensors = _without_wrapper(read_tensors(checkpoint.path))
    layout = _detect(tensors, checkpoint.name)
    has_tower = bool(layout.vision) and any(key.startswith(layout.vision) for key in tensors)
    if has_tower == (vision_from is not None):
        raise CheckpointError(_tower_advice(checkpoint.name, has_tower))
    text = _text_config(fields)
    projector_type = fields.string("mm_projector_type", "mlp2x_gelu")
    vision, tower = (
        (_vision_config(fields), None) if vision_from is None else _read_tower(vision_from)
    )
    source = _source(tensors, layout, vision, projector_type, checkpoint.name)
    if tower is None:
        tower = fold_fastvit(source, vision, "vision.")
    decoder = _Decoder(source, text, _Packings(fields))
    canonical = {f"vision_tower.{name}": tensor for name, tensor in tower.items()}
    canonical |= decoder.tensors(_padded_vocabulary(fields, layout))
    source_record: dict[str, str | None] = {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "layout": layout.name,
    }
    if vision_from is not None:
        source_record["vision_from"] = vision_from.name
    config = FastVLMConfig(
        text=text,
        vision=vision,
        projector_type=projector_type,
        image_size=_image_size(fields),
        image_mode="pad" if fields.string("image_aspect_ratio", "pad") == "pad" else "crop",
        max_length=min(
            fields.integer("tokenizer_model_max_length", 1, 1 << 20, MAX_LENGTH),
            text.max_position_embeddings,
        ),
        source=source_record,
    )
    canonical |= decoder.projector(config)
    source.drop(NEVER_USED)
    source.finish()
    config = FastVLMConfig.from_json(
        {**config.to_json(), "quantization": {p: asdict(q) for p, q in decoder.packed.items()}},
        fields.where,
    )
    return config, canonical


def _check_kind(fields: Fields) -> None:
    if fields.has("model_file"):
        raise ConfigError(
            f"{fields.where}: model_file: names code to run; code of a checkpoint is never run"
        )
    kind = fields.string("model_type", "")
    if kind not in ("llava_qwen2", "fast_vlm", "fastvlm"):
        raise ConfigError(
            f"{fields.where}: model_type {kind[:40]!r} is not a FastVLM; "
            "expected llava_qwen2 or fast_vlm, such as apple/FastVLM-0.5B"
        )


def _without_wrapper(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    prefix = "base_model.model."  # left by PEFT's merged checkpoints
    if not all(key.startswith(prefix) for key in tensors):
        return tensors
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items()}


def _detect(keys: Iterable[str], where: str) -> Layout:
    keys = list(keys)
    for layout in LAYOUTS:
        if layout.vision and any(key.startswith(layout.vision) for key in keys):
            return layout
    for layout in reversed(LAYOUTS):  # without a tower: by decoder and projector
        markers = layout.decoder, layout.projector.split("{")[0]
        if all(any(key.startswith(marker) for key in keys) for marker in markers):
            return layout
    raise CheckpointError(
        f"{where}: its tensors ({', '.join(sorted(keys)[:3])}, ...) are named like no known "
        f"FastVLM; known are {', '.join(layout.name for layout in LAYOUTS)}"
    )


def _tower_advice(where: str, has_tower: bool) -> str:
    if has_tower:
        return f"{where}: has an image tower of its own; leave out --vision-from"
    return (
        f"{where}: carries no image tower (Apple's app exports keep it in Core ML); add "
        "--vision-from with the original of the same size and stage, such as apple/FastVLM-0.5B"
    )


def _read_tower(checkpoint: Checkpoint) -> tuple[FastViTConfig, dict[str, mx.array]]:
    """The tower of another checkpoint, in whatever layout that is."""
    path = checkpoint.path / "config.json"
    values = read_json(path)
    tensors = read_tensors(checkpoint.path)
    if values.get("model_type") == MODEL_TYPE:
        config = FastVLMConfig.from_json(values, str(path))
        prefix = "vision_tower."
        return config.vision, {
            k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)
        }
    fields = Fields(values, str(path))
    _check_kind(fields)
    tensors = _without_wrapper(tensors)
    layout = _detect(tensors, checkpoint.name)
    vision = _vision_config(fields)
    towers = {k: t for k, t in tensors.items() if layout.vision and k.startswith(layout.vision)}
    if not towers:
        raise CheckpointError(f"{checkpoint.name}: given as --vision-from, but has no image tower")
    source = _source(towers, layout, vision, "identity", checkpoint.name)
    tower = fold_fastvit(source, vision, "vision.")
    source.drop(NEVER_USED)
    source.finish()
    return vision, tower


def _source(
    tensors: dict[str, mx.array],
    layout: Layout,
    vision: FastViTConfig,
    projector_type: str,
    where: str,
) -> Source:
    """The tensors under common names: vision.*, projector.N.*, model.*, lm_head.*."""
    network = network_indices(vision)

    def tower(rest: str) -> str:
        if not layout.apple:
            return rest
        return apple_tower_name(rest, network).replace("patch_embed.", layout.stem, 1)

    def name(common: str) -> str:
        part, _, rest = common.partition(".")
        if part == "vision":
            return layout.vision + tower(rest)
        if part == "projector":
            if projector_type == "linear" and "{even}" in layout.projector:
                return layout.projector.removesuffix(".{even}") + "." + rest.partition(".")[2]
            i, _, rest = rest.partition(".")
            layer = layout.projector.format(even=2 * int(i), ordinal=int(i) + 1)
            return f"{layer}.{rest}"
        if part == "lm_head":
            return f"{layout.lm_head}.{rest}"
        return layout.decoder + rest

    return Source(tensors, name, where, layout.nhwc)


def _text_config(fields: Fields) -> Qwen2Config:
    """The decoder's config, flat in LLaVA's form or under text_config in transformers'."""
    text = fields
    if fields.has("text_config") and fields.object("text_config").has("hidden_size"):
        text = fields.object("text_config")
    for key, only in (("use_sliding_window", False), ("hidden_act", "silu")):
        if text.get(key, only) != only:
            raise text.error(key, f"only {only} is supported")
    rope = text.object("rope_parameters") if text.has("rope_parameters") else text
    scaling = text.get("rope_scaling", None) or rope.values
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise text.error("rope_scaling", "only plain rotary positions are supported")
    defaults = {
        "rms_norm_eps": 1e-6,
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", ROPE_THETA)),
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
    }
    values = {key: text.get(key, default) for key, default in defaults.items()}
    vocab_size = text.integer("vocab_size", 1, 1_000_000)
    if fields.get("model_type") == "fast_vlm":
        vocab_size = PADDED_VOCABULARIES.get(vocab_size, vocab_size)
    merged = {**text.values, **values, "vocab_size": vocab_size}
    return Qwen2Config.from_json(Fields(merged, text.where))


def _padded_vocabulary(fields: Fields, layout: Layout) -> int:
    """Rows of the vocabulary as stored, before padding is cut back."""
    text = fields.object("text_config") if fields.has("text_config") else fields
    return int((text if text.has("vocab_size") else fields).get("vocab_size"))


def _vision_config(fields: Fields) -> FastViTConfig:
    """The tower's config: FastViTHD, or as vision_config spells it out."""
    given = fields.object("vision_config") if fields.has("vision_config") else Fields({}, "")
    tower = fields.string("mm_vision_tower", "mobileclip_l")
    name = given.string("architecture", "fastvit_mci3").removeprefix("fastvit_")
    if name not in PRESETS or not tower.startswith("mobileclip_l"):
        raise fields.error("mm_vision_tower", f"{tower[:40]!r}, {name[:40]!r} is not FastViTHD")
    if given.has("model_args"):
        given = given.object("model_args")
    values = PRESETS[name].to_json()
    values |= {key: value for key, value in given.values.items() if key in values}
    if "layers" in given.values and len(given.get("layers")) != len(values["se_downsamples"]):
        values["se_downsamples"] = [False] * len(given.get("layers"))
    return FastViTConfig.from_json(Fields(values, given.where or fields.where))


def _image_size(fields: Fields) -> int:
    """Input side in pixels: the integer after the last "_" of the tower's name."""
    suffix = fields.string("mm_vision_tower", "").rpartition("_")[2]
    return int(suffix) if re.fullmatch(r"[0-9]{1,5}", suffix) else IMAGE_SIZE


class _Packings:
    """What the config says of quantised layers; mlx-lm's form, with overrides by path."""

    def __init__(self, fields: Fields):
        key = next((k for k in ("quantization", "quantization_config") if fields.has(k)), None)
        self._fields = fields.object(key) if key else None

    def of(self, path: str) -> Quantization:
        """The packing of the layer that the source calls `path`."""
        if self._fields is None:
            raise CheckpointError(
                f"{path} has scales, but config.json says nothing of quantization; "
                'add "quantization": {"group_size": ..., "bits": ...}'
            )
        override = self._fields.values.get(path)
        values = {k: self._fields.values.get(k) for k in ("bits", "group_size", "mode")}
        if isinstance(override, dict):
            values |= override
        return Quantization.from_json(Fields(values, f"{self._fields.where}: {path}"))


class _Decoder:
    """Takes decoder and projector out of a source; notes how each layer is packed."""

    def __init__(self, source: Source, config: Qwen2Config, packings: _Packings):
        self.source = source
        self.config = config
        self.packings = packings
        self.packed: dict[str, Quantization] = {}

    def tensors(self, stored_vocabulary: int) -> dict[str, mx.array]:
        """Canonical tensors of the decoder."""
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
        return out | self._vocabulary(stored_vocabulary)

    def _vocabulary(self, stored: int) -> dict[str, mx.array]:
        """Embedding and output layer, cut back to the real vocabulary."""
        rows, D = self.config.vocab_size, self.config.hidden_size
        embedding = self._linear("language_model.embed_tokens", [("model.embed_tokens", stored)], D)
        head: dict[str, mx.array] = {}
        if not self.config.tie_word_embeddings:
            head = self._linear("language_model.lm_head", [("lm_head", stored)], D)
        elif self.source.has("lm_head.weight"):
            self._compare_tied(self._linear("lm_head", [("lm_head", stored)], D), embedding)
            self.packed.pop("lm_head", None)
        return {name: tensor[:rows] for name, tensor in (embedding | head).items()}

    def _compare_tied(self, head: dict[str, mx.array], embedding: dict[str, mx.array]) -> None:
        """The config ties the output layer to the embedding, yet the file has both."""
        pairs = list(zip(head.values(), embedding.values(), strict=False))
        same = len(head) == len(embedding) and all(a.shape == b.shape for a, b in pairs)
        if not same or not all(mx.array_equal(a, b).item() for a, b in pairs):
            print(
                f"warning: {self.source.where}: lm_head differs from embed_tokens, but config.json "
                "ties them; lm_head is ignored. Set tie_word_embeddings to false to use it",
                file=sys.stderr,
            )

    def projector(self, config: FastVLMConfig) -> dict[str, mx.array]:
        """Canonical tensors of the projector."""
        out: dict[str, mx.array] = {}
        width, inputs = self.config.hidden_size, config.vision.features
        for i in range(config.projector_depth):
            out |= self._linear(f"projector.{i}", [(f"projector.{i}", width)], inputs, bias=True)
            inputs = width
        return out

    def _linear(
        self, dst: str, parts: list[tuple[str, int]], inputs: int, *, bias: bool = False
    ) -> dict[str, mx.array]:
        """One layer out of one or more that share their input, each (name, rows)."""
        packings = [
            self.packings.of(self.source.key(f"{name}.scales").removesuffix(".scales"))
            if self.source.has(f"{name}.scales")
            else None
            for name, _ in parts
        ]
        if len(set(packings)) == 1 and packings[0] is not None:
            self.packed[dst] = packings[0]
            packed = [self._packed(name, n, inputs, packings[0]) for name, n in parts]
            out = {f"{dst}.{k}": mx.concatenate([p[k] for p in packed]) for k in packed[0]}
        else:  # parts packed unlike each other cannot be one packed layer: unpack them
            floats = [
                self.source.take(f"{name}.weight", (n, inputs))
                if packing is None
                else _unpacked(self._packed(name, n, inputs, packing), packing)
                for (name, n), packing in zip(parts, packings, strict=True)
            ]
            out = {f"{dst}.weight": mx.concatenate(floats)}
        if bias:
            biases = [self.source.take(f"{name}.bias", (n,)) for name, n in parts]
            out[f"{dst}.bias"] = mx.concatenate(biases)
        return out

    def _packed(
        self, name: str, rows: int, inputs: int, packing: Quantization
    ) -> dict[str, mx.array]:
        words, groups = inputs * packing.bits // 32, inputs // packing.group_size
        affine = packing.mode == "affine"
        scale_dtypes = {} if affine else {"dtypes": (mx.uint8,)}
        out = {
            "weight": self.source.take(f"{name}.weight", (rows, words), (mx.uint32,)),
            "scales": self.source.take(f"{name}.scales", (rows, groups), **scale_dtypes),
        }
        if affine:
            out["biases"] = self.source.take(f"{name}.biases", (rows, groups))
        return out


def _unpacked(packed: dict[str, mx.array], packing: Quantization) -> mx.array:
    return mx.dequantize(
        packed["weight"].astype(mx.uint32),
        packed["scales"],
        packed.get("biases"),
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
    )
