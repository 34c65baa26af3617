"""Several threads ask a model that has just been loaded, all at once; run in a fresh process.

Usage: cold_threads.py fastvlm|images|texts|both THREADS. Prints one JSON list: what each thread
got, and the same from the main thread afterwards.
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
    found: list[Any] = [None] * threads
    together = threading.Barrier(threads)

    def work(i: int) -> None:
        together.wait()
        found[i] = ask(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    alone = [ask(i) for i in range(4)]
    print(json.dumps([found, [alone[i % 4] for i in range(threads)]]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
