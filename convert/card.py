"""README.md of a converted checkpoint: what it is, where from, how made, how good."""

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlx_mobileclip import __version__
from mlx_mobileclip.quantization import Packed

from .quality import Agreement, Closeness, Size

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

{recipe}

{quality}

```sh
{use}
```

The command that made it:

```sh
{command}
```

The weights remain under the licence of their source: see NOTICE, and the licence file if there is
one. Apple's are licensed for research purposes only (Apple Machine Learning Research Model
License), and so are copies that are converted or quantised.
"""


@dataclass(frozen=True)
class Making:
    """What the card tells of a conversion."""

    name: str
    source: str
    base_model: str | None
    is_fastvlm: bool
    dtype: str
    arguments: list[str]


def recipe(packed: Packed, dtype: str) -> str:
    """In a sentence which layers are packed how."""
    if not packed:
        return f"All weights are {dtype}."
    kinds = Counter(packed.values())
    parts = [
        f"{number} layers in {kind.bits} bits ({kind.mode}, groups of {kind.group_size})"
        for kind, number in kinds.most_common()
    ]
    return f"Quantised: {', '.join(parts)}. All other weights are {dtype}."


def table(size: Size, cost: Agreement | Closeness) -> str:
    """The measured cost of quantising, as Markdown."""
    rows = [
        ("bits per weight, all weights", f"{size.bits_per_weight:.2f}"),
        ("bytes on disk", f"{size.disk_bytes:,}"),
    ]
    if isinstance(cost, Agreement):
        rows += [
            ("bytes read per token of an answer", f"{size.per_token_bytes:,}"),
            (f"KL divergence, mean of {cost.positions} tokens", f"{cost.kl:.3g} nats"),
            ("same likeliest token", f"{100 * cost.top_1:.1f} %"),
        ]
    else:
        rows.append(("cosine of image embeddings, mean", f"{cost.image:.5f}"))
        if cost.text is not None and cost.top_1 is not None:
            rows.append(("cosine of text embeddings, mean", f"{cost.text:.5f}"))
            rows.append(("same likeliest of 48 labels", f"{100 * cost.top_1:.1f} %"))
    body = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"| against the unquantised model | |\n|---|---|\n{body}"


def card(making: Making, packed: Packed, quality: str) -> str:
    """The whole file."""
    name = shlex.quote(making.name)
    if making.is_fastvlm:
        use = f'mlx-fastvlm --model {name} --image photo.jpg --prompt "What is this?"'
    else:
        use = f'mlx-mobileclip classify --model {name} --image photo.jpg --labels "cat,dog"'
    return CARD.format(
        base=f"base_model: {making.base_model}\n" if making.base_model else "",
        kind="fastvlm" if making.is_fastvlm else "mobileclip",
        name=making.name,
        made="Quantised" if packed else "Converted",
        version=__version__,
        source=making.source,
        recipe=recipe(packed, making.dtype),
        quality=quality or "Nothing was quantised.",
        use=use,
        command=f"python -m convert {shlex.join(map(_without_folders, making.arguments))}",
    )


def _without_folders(argument: str) -> str:
    """A path without the folders that lead to it, which are nobody's business."""
    path = Path(argument).expanduser()
    return path.name if path.parent != Path() and path.parent.is_dir() else argument
