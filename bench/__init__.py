"""Benchmarks of this package: `python -m bench COMMAND`; see README.md.

Needs a checkout: random checkpoints come from tests/support/synthetic.py, PyTorch models from
tests/parity/oracle.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]
