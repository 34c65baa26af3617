"""Call a freshly loaded model from several threads at once; run as a script in a new process.

Usage: cold_threads.py fastvlm|images|texts|both THREADS. Prints a JSON list of two lists: the
results of the threads, and those of the main thread afterwards.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
COLOURS = ("red", "green", "blue", "purple")
SCENES = [str(EXAMPLES / f"scene{i}.png") for i in ("", 2, 3, 4)]


def fastvlm() -> Callable[[int], Any]:
    import mlx_fastvlm

    model, processor = mlx_fastvlm.load("demo")
    question = "How many circles are there?"
    return lambda i: mlx_fastvlm.generate(model, processor, question, SCENES[i % 4]).text


def mobileclip(kind: str) -> Callable[[int], Any]:
    import mlx_mobileclip

    model, processor = mlx_mobileclip.load("demo")

    def embed(i: int) -> list[float]:
        if kind == "texts" or (kind == "both" and i % 2):
            texts = processor.texts([f"{COLOURS[i % 4]} circle"])
            rows = model.encode_text(texts, normalize=True)
        else:
            rows = model.encode_image(processor.images([SCENES[i % 4]]), normalize=True)
        return [round(float(value), 4) for value in np.asarray(rows)[0]]

    return embed


def main(kind: str, threads: int) -> None:
    ask = fastvlm() if kind == "fastvlm" else mobileclip(kind)
    results: list[Any] = [None] * threads
    barrier = threading.Barrier(threads)

    def work(i: int) -> None:
        barrier.wait()
        results[i] = ask(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = [ask(i) for i in range(4)]
    print(json.dumps([results, [expected[i % 4] for i in range(threads)]]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
