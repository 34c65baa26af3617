"""What this package costs, counted and measured: `python -m bench COMMAND`; see README.md.

Works in a checkout: random checkpoints come from tests/synthetic.py.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
