"""The demo models in PyTorch: timm's FastViT and transformers' Qwen2, with small dimensions."""

import math
import os
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# PyPI's torchvision for Linux is built for CUDA; timm needs its Python modules only.
with mock.patch("torch.library.register_fake", lambda *_, **__: lambda function: function):
    import torch
    import torchvision  # noqa: F401

import timm
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Qwen2Config, Qwen2ForCausalLM
from world import COLOURS, KINDS, SIZES, Scene

from mlx_fastvlm.models.fastvlm import IMAGE_TOKEN

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LONGEST_TEXT = 5
TOWER = {  # dimensions of both towers, as arguments of timm
    "layers": (1, 1, 3, 2, 1),
    "embed_dims": (16, 32, 64, 128, 256),
    "mlp_ratios": (3, 3, 3, 3, 2),
}
SUBCELLS = 2  # cells per output position along each axis; a cell has at most one shape


class Tower(nn.Module):
    """A FastViT trunk with all its branches, and auxiliary heads for training.

    The heads classify each cell of the third stage's feature map and of the output; a loss on text
    alone would take far longer. They are not exported.
    """

    def __init__(self, *, crop: bool):
        """Create the model; `crop` if images are cropped to a square rather than padded."""
        super().__init__()
        self.crop = crop
        self.empty_weight = 0.1  # weight of empty cells in the loss of the kind
        self.trunk = timm.create_model(
            "fastvit_mci3", num_classes=0, global_pool="", layer_scale_init_value=0.1, **TOWER
        ).to(memory_format=torch.channels_last)
        middle = TOWER["embed_dims"][2]
        self.kinds = len(KINDS) + 2  # class 0 is "empty", the last one "text"
        self.letters = len(LETTERS) + 1  # class 0 is "empty"
        per_cell = self.kinds + len(COLOURS) + len(SIZES) + 2
        self.middle_head = nn.Conv2d(middle, self.kinds + len(COLOURS) + self.letters, 1)
        self.final_head = nn.Conv2d(self.trunk.num_features, SUBCELLS**2 * per_cell, 1)
        self.text_head = nn.Conv2d(self.trunk.num_features, LONGEST_TEXT * self.letters, 1)
        self.where_head = nn.Conv2d(self.trunk.num_features, SUBCELLS**2 * 2, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) to the third stage's map (B, C, S/16, S/16) and the output (B, D, s, s)."""
        x = self.trunk.stem(pixels.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(self.trunk.stages):
            x = stage(x)
            if i == 2:
                middle = x
        return middle, self.trunk.final_conv(x)

    def loss(self, middle: Tensor, final: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        """Losses of the auxiliary heads, by name."""
        losses = {}
        grid = middle.shape[-1]
        names, colours, letters = self.middle_head(middle).split(
            (self.kinds, len(COLOURS), self.letters), 1
        )
        target = Targets(scenes, grid, self.crop)
        losses["middle kind"] = _rare(names, target.kinds, 0.1)
        losses["middle colour"] = F.cross_entropy(colours, target.colours, ignore_index=-1)
        losses["middle letter"] = _rare(letters, target.letters, 0.1)
        grid = final.shape[-1]
        target = Targets(scenes, grid * SUBCELLS, self.crop)
        cells = F.pixel_shuffle(self.final_head(final), SUBCELLS)
        names, colours, sizes, offsets = cells.split((self.kinds, len(COLOURS), len(SIZES), 2), 1)
        losses["kind"] = _rare(names, target.kinds, self.empty_weight)
        losses["colour"] = F.cross_entropy(colours, target.colours, ignore_index=-1)
        losses["size"] = F.cross_entropy(sizes, target.sizes, ignore_index=-1)
        known = (target.colours >= 0)[:, None].expand_as(offsets)
        losses["place"] = F.smooth_l1_loss(offsets[known], target.offsets[known])
        where = F.pixel_shuffle(self.where_head(final), SUBCELLS)
        losses["where"] = F.smooth_l1_loss(where[known], target.where[known])
        read = self.text_head(final).unflatten(1, (self.letters, LONGEST_TEXT))
        rows, written = texts(scenes, grid, self.crop)
        if len(rows):
            at = read[rows[:, 0], :, :, rows[:, 1], rows[:, 2]]  # (texts, letters, places)
            losses["text"] = F.cross_entropy(at, written)
        return losses


class FastVLM(nn.Module):
    """Tower, projector and decoder; module names are those of Apple's checkpoints."""

    def __init__(self, tower: Tower, text: dict[str, Any]):
        super().__init__()
        self.tower = tower
        wide, narrow = tower.trunk.num_features, text["hidden_size"]
        self.mm_projector = nn.Sequential(
            nn.Linear(wide, narrow), nn.GELU(), nn.Linear(narrow, narrow)
        )
        self.decoder = Qwen2ForCausalLM(Qwen2Config(**text, attn_implementation="eager"))
        self.pairs = nn.Linear(narrow, len(COLOURS) * len(KINDS))  # auxiliary heads, not exported
        self.places = nn.Linear(narrow, 2)
        self.numbers = nn.Linear(narrow, 1)

    def project(self, features: Tensor) -> Tensor:
        """Project features (n, D, s, s) to image tokens (n, s * s, H)."""
        return self.mm_projector(features.flatten(2).transpose(1, 2))

    def embed(self, features: Tensor, ids: Tensor) -> Tensor:
        """Embed ids (B, L) with the features (n, D, s, s) of all images, in order: (B, L, H)."""
        embedded = self.decoder.model.embed_tokens(ids.clamp(min=0))
        embedded[ids == IMAGE_TOKEN] = self.project(features).flatten(0, 1).to(embedded.dtype)
        return embedded

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of normalised hidden states (..., H)."""
        return self.decoder.lm_head(F.rms_norm(hidden, hidden.shape[-1:]))

    def hidden(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L, H) after half of the decoder's layers, and after the final norm."""
        embedded = self.embed(features, ids)
        out = self.decoder.model(inputs_embeds=embedded, output_hidden_states=True)
        return out.hidden_states[len(self.decoder.model.layers) // 2], out.last_hidden_state


class MobileCLIP(nn.Module):
    """Tower and projection, open_clip's text tower, and the logit scale."""

    def __init__(self, tower: Tower, text: dict[str, int], embed_dim: int):
        super().__init__()
        self.tower = tower
        self.projection = nn.Linear(tower.trunk.num_features, embed_dim)
        self.text = TextTransformer(**text, output_dim=embed_dim, no_causal_mask=True)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings (B, E), and the two feature maps of the tower."""
        middle, final = self.tower(pixels)
        return F.normalize(self.projection(final.mean((2, 3))), dim=-1), middle, final

    def texts(self, ids: Tensor) -> Tensor:
        """Unit embeddings (B, E) of ids (B, L)."""
        return F.normalize(self.text(ids), dim=-1)


def _rare(logits: Tensor, target: Tensor, empty_weight: float) -> Tensor:
    """Cross entropy in which class 0, "empty", has its own weight."""
    weight = torch.ones(logits.shape[1])
    weight[0] = empty_weight
    return F.cross_entropy(logits, target, weight)


class Targets:
    """Targets of the heads for each cell of a square grid over the preprocessed images."""

    def __init__(self, scenes: list[Scene], grid: int, crop: bool):
        shape = len(scenes), grid, grid
        self.kinds, self.letters = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        self.colours, self.sizes = (torch.full(shape, -1) for _ in range(2))
        self.offsets, self.where = (torch.zeros(len(scenes), 2, grid, grid) for _ in range(2))
        for b, scene in enumerate(scenes):
            for shape in scene.shapes:
                at, offset = cell(scene, shape.x, shape.y, grid, crop)
                self.kinds[b, *at] = 1 + KINDS.index(shape.kind)
                self.colours[b, *at] = list(COLOURS).index(shape.colour)
                self.sizes[b, *at] = list(SIZES).index(shape.size)
                self.offsets[b, :, *at] = torch.tensor(offset)
                share = shape.x / scene.width, shape.y / scene.height
                self.where[b, :, *at] = 4 * torch.tensor(share) - 2
            if scene.text is not None:
                at, _ = cell(scene, scene.text.x, scene.text.y, grid, crop)
                self.kinds[b, *at] = len(KINDS) + 1
                for letter, x, y in scene.text.letters:
                    at, _ = cell(scene, x, y, grid, crop)
                    self.letters[b, *at] = 1 + LETTERS.index(letter)


def texts(scenes: list[Scene], grid: int, crop: bool) -> tuple[Tensor, Tensor]:
    """Image, row and column of each printed text, (T, 3), and its letters, padded."""
    where, written = [], []
    for b, scene in enumerate(scenes):
        if scene.text is not None:
            where.append((b, *cell(scene, scene.text.x, scene.text.y, grid, crop)[0]))
            ids = [1 + LETTERS.index(c) for c in scene.text.content]
            written.append(ids + [0] * (LONGEST_TEXT - len(ids)))
    return torch.tensor(where), torch.tensor(written)


def cell(
    scene: Scene, x: float, y: float, grid: int, crop: bool
) -> tuple[tuple[int, int], list[float]]:
    """Grid cell (row, column) of a point after preprocessing, and its offset from the centre."""
    side = min(scene.width, scene.height) if crop else 1
    x = (x + (side - scene.width) / 2) / side * grid
    y = (y + (side - scene.height) / 2) / side * grid
    row, column = (max(0, min(int(v), grid - 1)) for v in (y, x))
    return (row, column), [x - column - 0.5, y - row - 0.5]
