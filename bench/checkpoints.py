"""Random full-size checkpoints on disk, in the layouts of Apple (FastVLM) and open_clip."""

from pathlib import Path

import synthetic
import synthetic_clip

from .cases import Case

VOCABULARY = 151_600  # ordinary tokens of FastVLM's tokenizer


def write(case: Case, directory: Path) -> Path:
    """Write the checkpoint of a case unless it exists; preprocessing cases have none."""
    if case.variant:
        path = directory / f"{case.variant.partition(':')[0]}.safetensors"
        if not path.exists():
            shapes = synthetic_clip.listing(path.stem, "open_clip")
            synthetic_clip.write(path, synthetic_clip.values(shapes))
        return path
    path = directory / f"fastvlm-{case.size}"
    if not case.preprocesses and not path.exists():
        tensors = synthetic.apple_tensors(case.size, lm_head="absent")
        synthetic.write(path, tensors, synthetic.apple_config(case.size, 1024))
        if case.size != "tiny":
            synthetic.write_tokenizer(path, size=VOCABULARY)
    return path
