"""Run `python -m mlx_fastvlm.generate`."""

import sys

from ..cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
