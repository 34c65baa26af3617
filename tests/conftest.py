"""Settings for all tests: offline, exact float32, this directory importable."""

import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # On a CPU MLX compiles kernels into the temporary directory, without a lock.
    os.environ["TMPDIR"] = str(Path(tempfile.gettempdir()) / f"mlx-fastvlm-{worker}")
    Path(os.environ["TMPDIR"]).mkdir(exist_ok=True)
    tempfile.tempdir = None
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLX_ENABLE_TF32"] = "0"
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("support", "parity")]
sys.path.append(str(Path(__file__).parent / "demo"))  # last: its module names are common words

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import PIL  # noqa: E402
import pytest  # noqa: E402

from mlx_mobileclip import device  # noqa: E402


def pytest_report_header() -> str:
    device = mx.default_device()
    return f"mlx {mx.__version__} on {device}, numpy {np.__version__}, Pillow {PIL.__version__}"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keep PyTorch from being imported for tests that will not run."""
    unwanted = collection_path.name == "parity" and "not parity" in config.option.markexpr
    return True if unwanted else None


@pytest.fixture(autouse=True, scope="session")
def default_to_float32() -> Iterator[None]:
    """Compare in float32 on a GPU as well, where `load` would default to float16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "default_dtype", lambda: mx.float32)
        yield


@pytest.fixture
def restore_file_limit() -> Iterator[None]:
    """Restore the limit on open files, which importing mlx_lm lowers."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], hard), hard))
