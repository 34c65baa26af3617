"""What this package costs, counted and measured: `python -m bench COMMAND`; see README.md.

Works in a checkout: random checkpoints come from tests/support/synthetic.py, PyTorch's models
from tests/parity/oracle.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]
