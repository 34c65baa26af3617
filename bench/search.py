"""Benchmark photo search against a reimplementation of rclip 4's loop on the same vectors."""

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import ROOT
from .record import table

DIM = 512
QUERY = "a red car on a bridge"
REPEATS = 9
ROWS_AT_ONCE = 8192
RCLIP_ROWS = 4096  # rows per read of rclip 4
NAME = "2026/2026-05 somewhere far away/IMG_{:08}.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", type=int, nargs="+", default=[100_000, 1_000_000])


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    results = []
    for count in args.photos:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(count, Path(folder)))
    rows = [[name, *(result[name] for result in results)] for name in results[0]]
    return table(["", *("" for _ in results)], rows), {"search": results}


def measure(count: int, folder: Path) -> dict[str, Any]:
    build_databases(count, folder)
    index_bytes, vector_bytes = (folder / "photos.db").stat().st_size, 2 * DIM * count
    ours, rclip = (_in_process(name, folder) for name in ("warm", "rclip"))
    return {
        "photos": count,
        "index_bytes": index_bytes,
        "index_bound": round(1.1 * vector_bytes + 450 * count),
        "warm_ms": ours["ms"],
        "first_ms": ours["first_ms"],
        "process_s": command_seconds(folder),
        "rss_of_vectors": round(ours["rss"] / vector_bytes, 2),
        "rclip_ms": rclip["ms"],
        "rclip_rss_of_vectors": round(rclip["rss"] / vector_bytes, 2),
        "times_rclip": round(rclip["ms"] / ours["ms"], 1),
    }


def vector_batches(count: int) -> Iterator[NDArray[np.float16]]:
    """Clustered unit vectors, like image embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4000, DIM), np.float32)
    for start in range(0, count, ROWS_AT_ONCE):
        size = min(ROWS_AT_ONCE, count - start)
        rows = centres[rng.integers(0, len(centres), size)]
        rows = rows + 0.7 * rng.standard_normal((size, DIM), np.float32) + 0.5
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def build_databases(count: int, folder: Path) -> None:
    """Write the same vectors as our index and as rclip's table of float32 rows."""
    from mlx_mobileclip.library import relevance
    from mlx_mobileclip.library.metadata import Metadata
    from mlx_mobileclip.library.queries import TextEmbeddings
    from mlx_mobileclip.library.scan import Stamp
    from mlx_mobileclip.library.store import Photo, Store

    store = Store(folder / "photos.db", create=True)
    store.set_meta(dim=DIM, model="random", text_identity="random")
    root, _ = store.root_for(b"/home/somebody/Pictures")
    rclip = sqlite3.connect(folder / "rclip.db")
    rclip.execute("PRAGMA page_size=16384")
    rclip.execute("CREATE TABLE images(id INTEGER PRIMARY KEY, filepath TEXT UNIQUE, vector BLOB)")
    first = 0
    metadata = Metadata("2026-05-01T12:00:00", "Apple iPhone 17", 52.5, 13.4)
    for rows in vector_batches(count):
        names = [NAME.format(first + i) for i in range(len(rows))]
        photos = [
            Photo(
                name.encode(),
                Stamp(3_000_000 + i, 1_780_000_000_000_000_000 + i),
                (first + i).to_bytes(16, "little"),
                metadata,
                4032,
                3024,
                (first + i) * 7919 << 20,
            )
            for i, name in enumerate(names)
        ]
        store.put(root, photos, list(rows))
        float32_rows = rows.astype(np.float32)
        pairs = zip(names, float32_rows, strict=True)
        rclip.executemany(
            "INSERT INTO images(filepath, vector) VALUES(?, ?)",
            [(n, v.tobytes()) for n, v in pairs],
        )
        rclip.commit()
        first += len(rows)
    rclip.close()
    texts = [QUERY, *relevance.contrast_texts(QUERY), *relevance.COMMON_TEXTS]
    vectors = np.random.default_rng(1).standard_normal((len(texts), DIM)).astype(np.float16)
    embed = TextEmbeddings(store)
    embed._write_cache([(embed._key(t), v.tobytes()) for t, v in zip(texts, vectors, strict=True)])
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()


def warm(folder: Path) -> dict[str, float]:
    """Time repeated searches in one process; the first one reads the vectors."""
    from mlx_mobileclip.library.library import Library

    with Library(folder / "photos.db") as library:
        seconds = []
        for _ in range(REPEATS + 2):
            started = time.perf_counter()
            library.search(QUERY, everything=True)
            seconds.append(time.perf_counter() - started)
        resident = _rss()
    assert "mlx.core" not in sys.modules
    return {
        "ms": round(1000 * median(seconds[2:]), 1),
        "first_ms": round(1000 * seconds[0], 1),
        "rss": resident,
    }


def rclip(folder: Path) -> dict[str, float]:
    """Time rclip 4's loop: each query reads all vectors and sorts all scores in Python."""
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    connection = sqlite3.connect(folder / "rclip.db")
    connection.execute("PRAGMA mmap_size=8589934592")

    def search() -> list[tuple[float, str]]:
        scores: list[tuple[float, str]] = []
        cursor = connection.execute("SELECT filepath, vector FROM images")
        while rows := cursor.fetchmany(RCLIP_ROWS):
            matrix = np.stack([np.frombuffer(vector, np.float32) for _, vector in rows])
            names = [name for name, _ in rows]
            scores += zip((matrix @ query).tolist(), names, strict=True)
        return sorted(scores, reverse=True)[:20]

    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - started)
    return {"ms": round(1000 * median(seconds), 1), "rss": _rss()}


def command_seconds(folder: Path) -> float:
    """Seconds of the whole command with a cached query, the best of five."""
    command = [sys.executable, "-m", "mlx_mobileclip", "search", QUERY, "--all", "--quiet"]
    command += ["--index", str(folder / "photos.db")]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return round(min(seconds), 2)


def _in_process(name: str, folder: Path) -> dict[str, float]:
    """Run one benchmark in a separate process, so that imports and memory are isolated."""
    command = [sys.executable, "-m", "bench.search", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, env=os.environ)
    report: dict[str, float] = json.loads(done.stdout)
    return report


def _rss() -> float:
    """Resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    [line] = [x for x in status.read_text().splitlines() if x.startswith("VmRSS")]
    return float(line.split()[1]) * 1024


if __name__ == "__main__":
    part = {"warm": warm, "rclip": rclip}[sys.argv[1]]
    print(json.dumps(part(Path(sys.argv[2]))))
