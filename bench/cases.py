"""Cases to compare: the same work for every contender that supports it."""

from dataclasses import dataclass

STRIDE = 64  # image px per token of FastVLM, in each direction
DECODE_PROMPT = 300  # tokens before the timed ones
FASTVLM = ("ours", "mlx-vlm", "transformers")
MOBILECLIP = ("ours", "open_clip", "onnxruntime")
VARIANTS = {  # those that open_clip supports too
    "s0": "MobileCLIP2-S0",
    "s2": "MobileCLIP-S2",
    "b": "MobileCLIP-B:open_clip",
}


@dataclass(frozen=True, slots=True)
class Case:
    """Work to measure.

    Attributes:
        name: Name for `--only`, which accepts a prefix too.
        work: "vision" (pixels to embeddings), "first" (images and a question to the first token),
            "second" (another question about the same images), "preprocess" (a decoded photo of
            12 megapixels to model input), "photo" (the same from a JPEG), "decode" (tokens after
            the first), "image" or "text" (towers of MobileCLIP).
        contenders: Contenders to compare; "ours" first.
        size: Size of the checkpoint, as in tests/support/synthetic.py.
        resolution: Side of the images, px.
        images: Images in the prompt.
        tokens: Text tokens in the prompt; for "decode", tokens to generate.
        batch: Batch size of images or texts.
        variant: MobileCLIP variant.
        dtype: dtype of weights and computation.
        gpu: Whether to compute on the GPU.
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
        """Whether the case only preprocesses images, which never uses a GPU."""
        return self.work in ("preprocess", "photo")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a FastVLM prompt, those of the images included."""
        return self.images * (self.resolution // STRIDE) ** 2 + self.tokens

    @property
    def is_headline(self) -> bool:
        """Whether FLOPs, tokens and weights are reported beside the times."""
        return self.name.startswith("headline")


def standard(size: str) -> list[Case]:
    """Cases that `python -m bench compare` runs; size "tiny" is for a quick trial."""
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
        clip_case(name, tower, batch)
        for name in (("s0",) if tiny else VARIANTS)
        for tower in ("image", "text")
        for batch in ((1,) if tiny else (1, 32))
    ]


def clip_case(name: str, tower: str, batch: int) -> Case:
    return Case(
        f"clip-{name}-{tower}-{batch}", tower, MOBILECLIP, batch=batch, variant=VARIANTS[name]
    )


def headline(size: str) -> list[Case]:
    """Cases of the claims in the models' papers; slow, so only on request.

    FastVLM's first token beside LLaVA-OneVision's, and the images a second of MobileCLIP-S2
    beside those of CLIP ViT-B/16.
    """
    models = ("ours", "transformers", "llava-onevision")
    variant = VARIANTS["s0" if size == "tiny" else "s2"]
    return [
        Case("headline-first-token", "first", models, size),
        Case(
            "headline-images", "image", ("ours", "open_clip", "openai-clip"),
            batch=2 if size == "tiny" else 16, variant=variant,
        ),
    ]  # fmt: skip


def scaling(size: str) -> list[Case]:
    """Cases that show how costs grow with resolution, images, tokens and batch size."""
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
    return cases + [clip_case("s0", "image", batch) for batch in (1, 4, 8, 16, 32)]
