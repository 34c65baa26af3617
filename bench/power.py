"""Power as reported by macOS's `powermetrics`, which needs administrator rights."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

COMMAND = ("sudo", "powermetrics", "--samplers", "cpu_power", "--sample-rate", "500")
COMBINED = re.compile(r"Combined Power \(.*\): (\d+) mW")


class Power:
    """Samples the power of CPU, GPU and ANE within a `with` block, if enabled."""

    def __init__(self, *, enabled: bool, command: Sequence[str] = COMMAND):
        self._command = command if enabled else ()
        self._process: subprocess.Popen[str] | None = None
        self._samples: list[tuple[float, float]] = []  # time, watts

    def __enter__(self) -> "Power":
        if self._command:
            try:
                self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
            except OSError as error:
                print(f"power is not measured: {error}", file=sys.stderr)
            else:
                self._reader = threading.Thread(target=self._read, daemon=True)
                self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._reader.join()
            self._process.communicate()

    def _read(self) -> None:
        assert self._process and self._process.stdout
        for line in self._process.stdout:
            if found := COMBINED.match(line):
                self._samples.append((time.monotonic(), int(found[1]) / 1000))

    def mean(self, since: float) -> float | None:
        """Mean power in W since a time of `time.monotonic`; None if unknown."""
        watts = [watts for taken, watts in self._samples if taken >= since]
        return sum(watts) / len(watts) if watts else None
