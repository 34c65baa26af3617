"""Soak test of the server: many clients with valid, malformed and cancelled requests.

Compares every answer with that of `generate`, and records the server's memory and the time to the
first token. Then compares the throughput of 8 clients with that of one, and computes an upper
bound of the gain.
"""

import argparse
import base64
import http.client
import io
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from convert.calibration import drawn_images
from mlx_fastvlm import generate, load
from mlx_fastvlm.generation.batch import BatchGenerator
from mlx_fastvlm.generation.image_cache import ImageCache
from mlx_fastvlm.generation.prompt_cache import PromptCache
from mlx_fastvlm.generation.request import Request
from mlx_mobileclip import load as load_clip

from . import ROOT
from .record import table

IMAGE_QUESTIONS = ("Describe the image.", "How many circles are there?", "What does it say?")
TEXT_QUESTIONS = ("Hello", "What is a circle?", "Which colours do you know?", "Count to three.")
LABELS = ("red circle", "blue circle", "green square", "yellow star")
IMAGES, MAX_TOKENS = 12, 48
LONG = 28  # minimum tokens of an answer whose throughput is timed
BATCH, ROUNDS = 8, 3
CHAT, EMBEDDINGS, CLASSIFY = "/v1/chat/completions", "/v1/embeddings", "/v1/classify"
KINDS = {"image": 40, "text": 20, "broken": 15, "cancelled": 15, "embedding": 5, "labels": 5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", metavar="M", help="default: demo")
    for option, default, text in (
        ("--requests", 2000, "requests in the soak test"),
        ("--clients", 16, "clients in the soak test"),
        ("--timed", 48, "answers per throughput measurement"),
    ):
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    task = Task(args.model)
    with serving(args.model) as server:
        soak = Soak(server, task, args.requests)
        soak.run(args.clients)
    rates = {}
    for known in (True, False):
        with serving(args.model) as server:
            rates["known" if known else "fresh"] = throughput(server, task, args.timed, known)
    for name, rate in rates.items():
        rate["ceiling"] = ceiling(task, known=name == "known")
    rows = [
        [name, f"{r['one']:.1f}", f"{r['eight']:.1f}", f"{r['gain']:.2f}", f"{r['ceiling']:.2f}"]
        for name, r in rates.items()
    ]
    header = ["images", "tokens/s, one client", f"{BATCH} clients", "gain", "ceiling"]
    return f"{soak.tables()}\n\n{table(header, rows)}", soak.record() | {"throughput": rates}


def data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat_body(model: str, question: str, uri: str | None, **fields: Any) -> dict[str, Any]:
    content: Any = question
    if uri is not None:
        image = {"type": "image_url", "image_url": {"url": uri}}
        content = [image, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": MAX_TOKENS, **fields}


class Task:
    """Requests, and their expected answers, each computed alone."""

    def __init__(self, model: str):
        self.name = model.rpartition("/")[2] if model.count("/") != 1 else model
        self.model, self.processor = load(model)
        self.images = drawn_images(IMAGES)
        self.uris = [data_uri(image) for image in self.images]
        self.answers: dict[tuple[str, int | None], str] = {}
        self.long: list[int] = []  # indices of images with a long description
        for question in IMAGE_QUESTIONS:
            for i, image in enumerate(self.images):
                result = self._alone(question, image)
                self.answers[question, i] = result.text
                if question == IMAGE_QUESTIONS[0] and result.stats.generation_tokens >= LONG:
                    self.long.append(i)
        for question in TEXT_QUESTIONS:
            self.answers[question, None] = self._alone(question, None).text
        clip, processor = load_clip("demo")
        self.embeddings = np.array(clip.encode_text(processor.texts(LABELS), normalize=True))
        self.image_embeddings = np.array(
            clip.encode_image(processor.images(self.images), normalize=True)
        )

    def _alone(self, question: str, image: Image.Image | None) -> Any:
        caches = {"prompt_cache": PromptCache(), "image_cache": ImageCache()}
        return generate(
            self.model, self.processor, question, image, max_tokens=MAX_TOKENS, **caches
        )

    def malformed(self, rng: random.Random) -> bytes:
        """Return a request that must get a 4xx response."""
        body = chat_body(self.name, "Hello", rng.choice(self.uris))
        url = body["messages"][0]["content"][0]["image_url"]
        change = rng.randrange(6)
        if change == 0:
            url["url"] = url["url"][: rng.randrange(30, len(url["url"]) // 2)]
        elif change == 1:
            url["url"] = "http://127.0.0.1:1/a.png"
        elif change == 2:
            body[rng.choice(["temperature", "stop", "seed", "max_tokens"])] = {"a": 1}
        elif change == 3:
            return json.dumps(body).encode()[: rng.randrange(1, 2000)]
        elif change == 4:
            return b'{"model": ' + b"[" * rng.randrange(1, 100_000)
        else:
            body["messages"] = [body["messages"][0], rng.choice([None, 7, {"role": "tool"}])]
        return json.dumps(body).encode()


class Server:
    """A server in a separate process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int):
        self.process, self.port = process, port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        connection = self.connect()
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def stream(self, body: dict[str, Any]) -> tuple[str, float, int]:
        """Return the text of a streamed answer, seconds to its first token, and token count."""
        connection = self.connect()
        started, first, text, tokens = time.perf_counter(), 0.0, "", 0
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", CHAT, json.dumps(body).encode(), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(response.read().decode())
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and (piece := event["choices"][0]["delta"].get("content")):
                    first = first or time.perf_counter() - started
                    text += piece
                if event["usage"]:
                    tokens = event["usage"]["completion_tokens"]
        finally:
            connection.close()
        return text, first, tokens

    def memory_mb(self) -> float:
        """Resident memory of the process in MB."""
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout) / 1024


@contextmanager
def serving(model: str) -> Iterator[Server]:
    """Start a server, and shut it down gracefully."""
    command = [sys.executable, "-m", "mlx_fastvlm.server", "--model", model, "--port", "0"]
    command += ["--clip-model", "demo"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if match := re.search(r"serving at http://127.0.0.1:(\d+)/", line):
                yield Server(process, int(match[1]))
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=60)
        if rest.strip() or process.returncode:
            print(f"the server ended with {process.returncode}: {rest}", file=sys.stderr)


@dataclass
class Soak:
    """Concurrent requests of all kinds, and their results."""

    server: Server
    task: Task
    requests: int
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_s: dict[str, list[float]] = field(default_factory=lambda: {"image": [], "text": []})
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0
    lock: Lock = field(default_factory=Lock)

    def run(self, clients: int) -> None:
        rng = random.Random(0)
        kinds = rng.choices(list(KINDS), list(KINDS.values()), k=self.requests)
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for _ in pool.map(self._one, range(self.requests), kinds):
                pass
        self.seconds = time.perf_counter() - started
        self.memory.append(self.server.memory_mb())

    def _one(self, number: int, kind: str) -> None:
        if number % max(1, self.requests // 20) == 0:
            with self.lock:
                self.memory.append(self.server.memory_mb())
        try:
            problem = getattr(self, f"_{kind}")(random.Random(number))
        except Exception as error:  # noqa: BLE001 (counted)
            problem = f"{type(error).__name__}: {error}"
        with self.lock:
            self.counts[kind] += 1
            if problem:
                self.wrong.append(f"{number} {kind}: {problem}"[:300])

    def _chat(self, rng: random.Random, question: str, image: int | None) -> str:
        uri = None if image is None else self.task.uris[image]
        body = chat_body(self.task.name, question, uri)
        if rng.random() < 0.5:
            text, first, _ = self.server.stream(body)
            with self.lock:
                self.first_s["text" if image is None else "image"].append(first)
        else:
            status, data = self.server.post(CHAT, json.dumps(body).encode())
            if status != 200:
                return f"{status} {data!r}"
            text = json.loads(data)["choices"][0]["message"]["content"]
        expected = self.task.answers[question, image]
        return "" if text == expected else f"{text!r} instead of {expected!r}"

    def _image(self, rng: random.Random) -> str:
        return self._chat(rng, rng.choice(IMAGE_QUESTIONS), rng.randrange(IMAGES))

    def _text(self, rng: random.Random) -> str:
        return self._chat(rng, rng.choice(TEXT_QUESTIONS), None)

    def _broken(self, rng: random.Random) -> str:
        status, data = self.server.post(CHAT, self.task.malformed(rng))
        return "" if 400 <= status < 500 and b'"error"' in data else f"{status} {data!r}"

    def _cancelled(self, rng: random.Random) -> str:
        """Disconnect before, during or after the body, or during the answer."""
        uri = rng.choice([None, rng.choice(self.task.uris)])
        body = json.dumps(chat_body(self.task.name, "Describe.", uri, stream=True)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        data = head.encode() + body
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as client:
            client.sendall(data[: rng.choice([len(head) // 2, len(data) // 2, len(data)])])
            if rng.random() < 0.3:
                client.settimeout(rng.random())
                with suppress(TimeoutError):
                    client.recv(10)
        return ""

    def _embedding(self, rng: random.Random) -> str:
        i = rng.randrange(IMAGES)
        value = [*LABELS, {"image": self.task.uris[i]}]
        body = {"model": "demo", "input": value}
        status, data = self.server.post(EMBEDDINGS, json.dumps(body).encode())
        rows = np.array([entry["embedding"] for entry in json.loads(data)["data"]])
        expected = np.concatenate([self.task.embeddings, self.task.image_embeddings[i : i + 1]])
        return "" if status == 200 and np.abs(rows - expected).max() < 1e-4 else f"{status}"

    def _labels(self, rng: random.Random) -> str:
        body = {"model": "demo", "input": rng.choice(self.task.uris), "labels": LABELS}
        status, data = self.server.post(CLASSIFY, json.dumps(body).encode())
        found = {p["label"] for p in json.loads(data)["data"][0]["predictions"]}
        return "" if status == 200 and found == {*LABELS} else f"{status} {data!r}"

    def tables(self) -> str:
        times = [
            [f"first token, {kind}", f"{1e3 * median(s):.0f}", f"{1e3 * np.percentile(s, 95):.0f}"]
            for kind, s in self.first_s.items()
            if s
        ]
        memory = self.memory
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        lines = [
            f"{self.requests} requests in {self.seconds:.0f} s: {kinds}.",
            f"Wrong answers: {len(self.wrong)}.",
            f"Memory in MB: {memory[0]:.0f} at first, {memory[len(memory) // 4]:.0f} after a "
            f"quarter, {memory[len(memory) // 2]:.0f} after half, {memory[-1]:.0f} at the end.",
            *self.wrong[:10],
        ]
        return "\n".join(lines) + "\n\n" + table(["time", "median, ms", "95 %, ms"], times)

    def record(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "counts": dict(self.counts),
            "wrong": self.wrong,
            "seconds": self.seconds,
            "memory_mb": self.memory,
            "first_token_s": self.first_s,
        }


def variants(task: Task, count: int, known: bool) -> list[Image.Image]:
    """Return images with a long description; if not known, each is unique and uncached."""
    chosen = [task.images[task.long[i % len(task.long)]].copy() for i in range(count)]
    if not known:
        for i, image in enumerate(chosen):
            image.putpixel((0, 0), (i % 256, i // 256, random.randrange(256)))
    return chosen


def throughput(server: Server, task: Task, count: int, known: bool) -> dict[str, Any]:
    """Tokens per second of one client and of BATCH clients."""
    rates: dict[int, list[float]] = {1: [], BATCH: []}
    if known:
        for uri in map(data_uri, variants(task, len(task.long), known)):
            server.stream(chat_body(task.name, IMAGE_QUESTIONS[0], uri))
    for clients in (1, BATCH) * ROUNDS:  # alternating, as the load of the machine varies
        bodies = [
            chat_body(task.name, IMAGE_QUESTIONS[0], data_uri(image))
            for image in variants(task, count // ROUNDS, known)
        ]
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            tokens = [n for _, _, n in pool.map(server.stream, bodies)]
        rates[clients].append(sum(tokens) / (time.perf_counter() - started))
    one, eight = (median(rates[clients]) for clients in (1, BATCH))
    return {"one": one, "eight": eight, "gain": eight / one, "rounds": list(rates.values())}


def ceiling(task: Task, *, known: bool) -> float:
    """Upper bound of the gain of batching: that of the model without a server."""
    alone = _seconds(task, 1, known)
    together = _seconds(task, BATCH, known)
    return BATCH * alone / together


def _seconds(task: Task, size: int, known: bool) -> float:
    """Median seconds for `size` answers in one batch, in this process, after a warm-up."""
    caches = {"prompt_cache": PromptCache(), "image_cache": ImageCache()}
    times = []
    for repeat in range(6):
        batch = BatchGenerator(task.model, task.processor, max_batch_size=size, **caches)
        images = variants(task, max(size, BATCH), known)[: max(size, BATCH)]
        started = time.perf_counter()
        for group in _groups(images, size):
            for image in group:
                batch.add(Request(IMAGE_QUESTIONS[0], image, max_tokens=MAX_TOKENS))
            while len(batch):
                batch.step()
        if repeat:
            times.append((time.perf_counter() - started) * size / len(images))
    return median(times)


def _groups(images: Sequence[Image.Image], size: int) -> Iterator[Sequence[Image.Image]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
