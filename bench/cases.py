"""What is compared: one piece of work each, done alike by every contender that can."""

from dataclasses import dataclass

DECODE_PROMPT = 300  # tokens before those that are timed
FASTVLM = ("ours", "mlx-vlm", "transformers")
MOBILECLIP = ("ours", "open_clip")
VARIANTS = {  # those that open_clip has too
    "s0": "MobileCLIP2-S0",
    "s2": "MobileCLIP-S2",
    "b": "MobileCLIP-B:open_clip",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work.

    Attributes:
        name: For `--only`, which takes its beginning too.
        work: "vision" (pixels to embeddings), "first" (images and a question to the first token),
            "second" (another question about the same images), "preprocess" (a photo of 12
            megapixels to pixels), "photo" (the same from a JPEG),
            "decode" (token after token), "image" or "text" (MobileCLIP's towers).
        contenders: Who does it; "ours" first.
        size: Of the checkpoint, as in tests/support/synthetic.py.
        resolution: Of images, px.
        images: In a prompt.
        tokens: Of a prompt, those of images aside; or generated, if decoding.
        batch: Images or texts at a time.
        variant: Of MobileCLIP.
        dtype: Of weights and arithmetic.
        gpu: Whether that is done on the GPU.
    """

    name: str
    work: str
    contenders: tuple[str, ...] = FASTVLM
    size: str = "0.5b"
    resolution: int = 1024
    images: int = 1
    tokens: int = 64
    batch: int = 1
    variant: str = ""
    dtype: str = "float32"
    gpu: bool = False

    @property
    def preprocesses(self) -> bool:
        """Whether it ends at pixels, which no GPU has a part in."""
        return self.work in ("preprocess", "photo")


def usual(size: str) -> list[Case]:
    """The cases that `python -m bench compare` runs; "tiny" is for trying it out."""
    tiny = size == "tiny"
    resolution = 128 if tiny else 1024
    cases = [
        Case("vision", "vision", size=size, resolution=resolution),
        Case("first-token", "first", size=size, resolution=resolution),
        Case("second-question", "second", size=size, resolution=resolution),
        Case("preprocess", "preprocess", size=size),
        Case("photo", "photo", size=size),
        Case(
            "decode", "decode", ("ours", "mlx-lm", "transformers"), size, tokens=4 if tiny else 32
        ),
    ]
    return cases + [
        clip(name, tower, batch)
        for name in (("s0",) if tiny else VARIANTS)
        for tower in ("image", "text")
        for batch in ((1,) if tiny else (1, 32))
    ]


def clip(name: str, tower: str, batch: int) -> Case:
    return Case(
        f"clip-{name}-{tower}-{batch}", tower, MOBILECLIP, batch=batch, variant=VARIANTS[name]
    )


def scaling(size: str) -> list[Case]:
    """How costs grow with pixels, images, tokens and batch."""
    cases = [
        Case(f"vision-{resolution}", "vision", size=size, resolution=resolution)
        for resolution in (256, 512, 768, 1024, 1536)
    ]
    cases += [
        Case(f"images-{images}", "first", size=size, resolution=512, images=images)
        for images in (1, 2, 4, 8)
    ]
    cases += [
        Case(f"prompt-{tokens}", "first", size=size, images=0, tokens=tokens)
        for tokens in (300, 1000, 2000, 4000)
    ]
    return cases + [clip("s0", "image", batch) for batch in (1, 4, 8, 16, 32)]
