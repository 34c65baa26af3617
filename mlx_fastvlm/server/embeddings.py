"""Endpoints of MobileCLIP: /v1/embeddings and /v1/classify.

Source: OpenAI's /embeddings; infinity's `modality`; jina's `embedding_type`, `normalized` and
/v1/classify.
"""

import base64
from typing import Any

from mlx_mobileclip.eval.zero_shot import PLAIN_TEMPLATE

from .clip import Clip, Rows
from .clip_inputs import read_inputs
from .fields import Fields, shown
from .metrics import Metrics

MAX_LABELS, MAX_TEMPLATES, MAX_PROMPTS = 1000, 100, 10_000
MAX_LABEL_CHARACTERS = 1000
# Accepted without effect, such as jina's tasks and truncation.
IGNORED = ("user", "task", "truncate", "late_chunking", "priority")


async def embed(body: Fields, clip: Clip, metrics: Metrics, name: str, max_images: int) -> Any:
    """Embed texts and images; raises ApiError if the request is invalid."""
    items = read_inputs(body, max_images)
    formats = ("float", "base64")
    encoding = body.choice("encoding_format", formats, "float")
    encoding = body.choice("embedding_type", formats, encoding)
    normalize = body.boolean("normalized", True)
    size = body.integer("dimensions", 1, 1 << 20)
    if size not in (None, clip.size):
        raise body.error("dimensions", f"must be {clip.size}, not {size}")
    body.ignore(*IGNORED)
    body.end()
    rows, tokens = await clip.embed(items, normalize=normalize)
    for kind in {item.kind for item in items}:
        metrics.embedded(kind, sum(item.kind == kind for item in items))
    data = [
        {"object": "embedding", "index": i, "embedding": values}
        for i, values in enumerate(_encode(rows, encoding))
    ]
    return {
        "object": "list",
        "model": name,
        "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encode(rows: Rows, encoding: str) -> list[Any]:
    if encoding == "float":
        return rows.tolist()
    data = rows.astype("<f4")
    return [base64.b64encode(row.tobytes()).decode() for row in data]


async def classify(body: Fields, clip: Clip, metrics: Metrics, name: str, max_images: int) -> Any:
    """Classify images by labels; raises ApiError if the request is invalid."""
    items = read_inputs(body, max_images)
    for item in items:
        if item.kind != "image":
            raise body.error("input", "must have images only; texts are not classified")
    labels = _texts(body, "labels", MAX_LABELS)
    templates = list(PLAIN_TEMPLATE)
    if body.get("templates") is not None:
        templates = _texts(body, "templates", MAX_TEMPLATES)
    if len(labels) * len(templates) > MAX_PROMPTS:
        raise body.error("templates", f"times labels is more than {MAX_PROMPTS} prompts")
    top_k = body.integer("top_k", 1, MAX_LABELS) or len(labels)
    body.ignore(*IGNORED)
    body.end()
    results = await clip.classify(items, labels, templates, top_k)
    metrics.embedded("image", len(items))
    return {
        "object": "list",
        "model": name,
        "data": [
            {
                "object": "classification",
                "index": i,
                "prediction": best[0].label,
                "score": best[0].probability,
                "predictions": [
                    {"label": p.label, "score": p.probability, "similarity": p.similarity}
                    for p in best
                ],
            }
            for i, best in enumerate(results)
        ],
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


def _texts(body: Fields, key: str, max_count: int) -> list[str]:
    texts = body.texts(key, max_count)
    for i, text in enumerate(texts):
        if not text.strip() or len(text) > MAX_LABEL_CHARACTERS:
            raise body.error(
                f"{key}[{i}]", f"must have 1 to {MAX_LABEL_CHARACTERS} characters: {shown(text)}"
            )
    return texts
