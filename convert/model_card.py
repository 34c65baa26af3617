"""The model card: README.md of a converted checkpoint."""

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_mobileclip import __version__
from mlx_mobileclip.paths import user_path
from mlx_mobileclip.quantization import QuantizedLayers
from mlx_mobileclip.terminal import printable

from .quantize.quality import Agreement, Similarity, Size

CARD = """---
library_name: mlx
license: other
license_name: see-LICENSE-and-NOTICE
{base}tags:
- mlx
- {kind}
---

# {name}

{made} by mlx-fastvlm {version} from {source}.

{quantization}

{quality}

```sh
{use}
```

Made with this command:

```sh
{command}
```

The weights remain under the licence of their source: see NOTICE, and the licence file if there is
one. Apple's are licensed for research purposes only (Apple Machine Learning Research Model
License), and so are copies that are converted or quantised.
"""
USE = {
    "fastvlm": 'mlx-fastvlm generate --model {name} --image photo.jpg --prompt "What is this?"',
    "mobileclip": 'mlx-mobileclip classify --model {name} --image photo.jpg --labels "cat,dog"',
}


def quantization_summary(quantized: QuantizedLayers, dtype: str) -> str:
    """Summarise how many layers are quantised, and to how many bits.

    Args:
        quantized: Quantisation of each quantised layer.
        dtype: Name of the dtype of all other weights.
    """
    if not quantized:
        return f"All weights are {dtype}."
    kinds = Counter(quantized.values())
    parts = [
        f"{number} layers in {kind.bits} bits ({kind.mode}, groups of {kind.group_size})"
        for kind, number in kinds.most_common()
    ]
    return f"Quantised: {', '.join(parts)}. All other weights are {dtype}."


def quality_table(size: Size, quality: Agreement | Similarity) -> str:
    """Markdown table of the size and the measured quality of a quantised checkpoint."""
    rows = [
        ("bits per weight, all weights", f"{size.bits_per_weight:.2f}"),
        ("bytes on disk", f"{size.disk_bytes:,}"),
    ]
    if isinstance(quality, Agreement):
        rows += [
            ("bytes read per token of an answer", f"{size.per_token_bytes:,}"),
            (f"KL divergence, mean of {quality.positions} tokens", f"{quality.kl:.3g} nats"),
            ("same most likely token", f"{100 * quality.top_1:.1f} %"),
        ]
    else:
        rows.append(("cosine of image embeddings, mean", f"{quality.image:.5f}"))
        if quality.text is not None and quality.top_1 is not None:
            rows.append(("cosine of text embeddings, mean", f"{quality.text:.5f}"))
            rows.append(("same most likely of 48 labels", f"{100 * quality.top_1:.1f} %"))
    body = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| against the unquantised model | |\n|---|---|\n{body}"


def model_card(
    *,
    name: str,
    kind: str,
    source: str,
    base_model: str | None,
    quantized: QuantizedLayers,
    dtype: str,
    quality: str,
    command_line: Sequence[str],
) -> str:
    """Return the text of README.md.

    Args:
        name: Name of the directory.
        kind: "fastvlm" or "mobileclip".
        source: Name of the source, and its commit if it is a repository.
        base_model: The source if it is a repository.
        quantized: Quantisation of each quantised layer.
        dtype: Name of the dtype of all other weights.
        quality: Table from `quality_table`; empty if this conversion quantised nothing.
        command_line: Arguments of `python -m convert` that repeat the conversion.
    """
    card = CARD.format(
        base=f"base_model: {base_model}\n" if base_model else "",
        kind=kind,
        name=name,
        made="Quantised" if quantized else "Converted",
        version=__version__,
        source=source,
        quantization=quantization_summary(quantized, dtype),
        quality=quality or "Nothing was quantised.",
        use=USE[kind].format(name=shlex.quote(name)),
        command=f"python -m convert {shlex.join(map(_without_folders, command_line))}",
    )
    return printable(card, keep="\n")


def _without_folders(argument: str) -> str:
    """Drop the parent directories of a path, whose names may be private."""
    path = user_path(argument)
    is_path = path.parent != Path() and os.path.isdir(path.parent)  # noqa: PTH112 (never raises)
    return path.name if is_path else argument
