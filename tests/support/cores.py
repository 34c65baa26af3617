"""Divide MLX's CPU work among a given number of cores, and record the streams it uses."""

import io
import re

import mlx.core as mx
import pytest

from mlx_mobileclip.cpu import depthwise, executor


def divide(monkeypatch: pytest.MonkeyPatch, cores: int) -> list[mx.Stream]:
    """Divide all work among `cores` cores.

    Returns:
        The streams used, in order; the list grows as work is divided.
    """
    streams = [mx.new_stream(mx.cpu) for _ in range(cores)]
    monkeypatch.setattr(executor, "_streams", lambda: streams)
    monkeypatch.setattr(executor, "cores", lambda: cores)
    monkeypatch.setattr(depthwise, "cores", lambda: cores)
    monkeypatch.setattr(executor, "PARALLEL_FROM", 0)
    started: list[mx.Stream] = []
    stream = mx.stream
    monkeypatch.setattr(mx, "stream", lambda s: started.append(s) or stream(s))
    return started


def graph_names(array: mx.array) -> list[str]:
    """Names of the primitives in the graph of an array."""
    listing = io.StringIO()
    mx.export_to_dot(listing, array)
    return re.findall(r'label ="(\w+)"', listing.getvalue())
