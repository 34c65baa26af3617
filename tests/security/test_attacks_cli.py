"""Hostile arguments, terminals and Hub contents for the command lines and the converter."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import isolated
import pytest
import synthetic

from mlx_fastvlm import ModelError
from mlx_fastvlm.cli.generate import main
from mlx_fastvlm.loader import find_checkpoint
from mlx_mobileclip.errors import CheckpointError

COMMAND = [sys.executable, "-m", "mlx_fastvlm.generate"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_layout(tmp_path_factory.mktemp("model") / "sound", "llava_qwen2")


# Usage and numbers


BAD_ARGUMENTS = [
    (["--temp", "nan"], "temperature is nan"),
    (["--temp", "-1"], "temperature is -1"),
    (["--top-p", "inf"], "top_p is inf"),
    (["--max-tokens", "0"], "max_tokens is 0"),
    (["--max-tokens", "999999999999999999999"], "max_tokens is 999"),
    (["--seed", "-1"], "seed is -1"),
    (["--stop", ""], "stop text"),
    (["--resolution", "300"], "resolution 300 is not one of"),
    (["--image", "missing.jpg"], "missing.jpg: no such file"),
    (["--image", "http://localhost/x.png"], "URLs are not opened"),
    (["--vision-from", "SOUND"], "already has an image tower"),
    (["--prompt", "\udcff"], "not valid Unicode"),
    (["--prompt", "x" * 100000], "Shorten it"),
    (["--model", "no/such\n\x1b[2Jplace/"], "no such directory"),
    (["--model", "x" * 5000], "cannot be read"),
    (["--model", "~nobody-of-that-name"], "no such directory"),
    (["--model", "x\0"], "no such directory"),
    (["--model", ""], "the name of the checkpoint is empty"),
    (["--model", "/dev/null"], "no such directory"),
    (["--model", "unknown/repository"], "not in the cache"),
    (["--model", "a--b/c"], "not a valid repository name"),
    (["--model", "a/b", "--revision", "../../x"], "a/b: "),
]
Q = ["-q", "--q-bits"]
BAD_CONVERSIONS = [
    ([*Q, "0"], "bits: 0 is not"),
    ([*Q, "7"], "bits: 7 is not one of"),
    (["-q", "--q-group-size", "0"], "group_size: 0 is not"),
    (["-q", "--q-group-size", "128"], "choose another --q-group-size"),
    (["--mlx-path", "SOUND"], "already exists"),
    (["--mlx-path", "SOUND/config.json"], "already exists"),
    (["--mlx-path", "SOUND/config.json/x"], "cannot be written"),
    (["--mlx-path", "/proc/x"], "cannot be written"),
    (["--mlx-path", "/dev/null"], "already exists"),
    (["--mlx-path", "x" * 300], "cannot be written"),
    (["--mlx-path", "BASE/loop"], "cannot be written"),
    (["--mlx-path", "BASE/dangling"], "cannot be written"),
    (["--mlx-path", "."], "give a new directory"),
    (["--mlx-path", ""], "give a new directory"),
    (["--vision-from", "SOUND"], "already has an image tower"),
    (["--model", "BASE/done", "--vision-from", "SOUND"], "already has an image tower"),
    (["--model", "BASE/unfit"], "belong to different models"),
]


@pytest.fixture(scope="module")
def refusals(sound: Path) -> list[isolated.Outcome]:
    """Outcomes of all bad arguments, run in one process."""
    base = sound.parent
    (base / "loop").symlink_to("loop")
    (base / "dangling").symlink_to("nowhere")
    synthetic.write_layout(base / "unfit", "llava_qwen2")
    vocabulary = base / "unfit" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('": 255', '": 9999', 1))
    done = ["--model", str(sound), "--mlx-path", str(base / "done")]

    def real(arguments: list[str]) -> list[str]:
        return [a.replace("SOUND", str(sound)).replace("BASE", str(base)) for a in arguments]

    cases = [
        ("answer", ["--model", str(sound), "--prompt", "q", *real(a)]) for a, _ in BAD_ARGUMENTS
    ]
    target = ["--model", str(sound), "--mlx-path", str(base / "out")]
    cases += [("convert", [*target, *real(a)]) for a, _ in BAD_CONVERSIONS]
    return isolated.run([("convert", done), *cases])[1:]


@pytest.mark.parametrize("index", range(len(BAD_ARGUMENTS + BAD_CONVERSIONS)))
def test_bad_argument_is_a_one_line_error(refusals: list[isolated.Outcome], index: int) -> None:
    reason = (BAD_ARGUMENTS + BAD_CONVERSIONS)[index][1]
    isolated.assert_refused(refusals[index], reason)


def test_refused_conversion_leaves_nothing(refusals: list[isolated.Outcome], sound: Path) -> None:
    names = {path.name for path in sound.parent.iterdir()}
    assert names == {"sound", "done", "unfit", "loop", "dangling"}


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=isolated.ENVIRONMENT,
        **options,
    )


@pytest.mark.parametrize("arguments", [["--temp", "x"], ["--max-tokens", "1e3"], ["--bogus"]])
def test_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().out == ""


def test_error_without_traceback(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


# Interruption, pipes and terminals


def endless(sound: Path) -> list[str]:
    """A command with an answer of 8,000 tokens; greedy, as a sampled answer may end early."""
    options = ["--prompt", "q", "--max-tokens", "8000", "--temp", "0", "--quiet"]
    return [*COMMAND, "--model", str(sound), *options]


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=isolated.ENVIRONMENT, **options)


def test_interrupt_exits_130(sound: Path) -> None:
    pipe = subprocess.PIPE
    with start(endless(sound), stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr
        assert process.stderr.read() == b"\ninterrupted\n"


def test_closed_pipe_is_quiet(sound: Path) -> None:
    pipe = subprocess.PIPE
    with start(endless(sound), stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(20) == 130
        assert process.stderr
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_one_line(sound: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [*COMMAND, "--model", str(sound), "--max-tokens", "2", "--quiet"]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=isolated.ENVIRONMENT, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert done.stderr.count(b"\n") == 1


def test_escapes_are_stripped_on_a_terminal_only() -> None:
    code = (
        "from mlx_fastvlm.cli.run_generate import _for_stdout; "
        "print(_for_stdout('a\\x1b]0;owned\\x07b\\x9b2J\\x7fc\\r\\td'), end='')"
    )
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, capture_output=True, env=isolated.ENVIRONMENT, timeout=60)
    assert piped.stdout.decode() == "a\x1b]0;owned\x07b\x9b2J\x7fc\r\td"
    ours, theirs = os.openpty()
    with start(command, stdout=theirs) as process:
        process.wait(20)
    shown = os.read(ours, 999)
    os.close(theirs)  # not before: macOS drops what is unread
    os.close(ours)
    assert shown == b"a]0;ownedb2Jc\td"


# The converter


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, arguments), "--quiet"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=isolated.ENVIRONMENT
    )


def test_planted_links_are_not_published(sound: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in sound.iterdir():
        (source / path.name).hardlink_to(path)
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (source / "LICENSE").write_text("terms")
    (source / "LICENSE_MODEL").symlink_to("LICENSE")
    (source / "LICENSE.md").symlink_to(secret)
    (source / "LICENSE.py").write_text("x")
    (source / "LICENSE.txt").mkdir()
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "evil.py").write_text("x")
    (source / "LICENSE.gguf").write_text("x")
    done = convert("--model", source, "--mlx-path", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"config.json", "model.safetensors", "tokenizer.json", "NOTICE"}
    assert found == weights | {"LICENSE", "LICENSE_MODEL", "README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_planted_partial_directory_is_harmless(sound: Path, tmp_path: Path) -> None:
    """Leftovers of a killed conversion are replaced; a link there is not followed."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "junk").touch()
    assert convert("--model", sound, "--mlx-path", tmp_path / "out").returncode == 0
    assert not (tmp_path / "out" / "junk").exists()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (tmp_path / ".new.partial").symlink_to(victim)
    done = convert("--model", sound, "--mlx-path", tmp_path / "new")
    assert done.returncode == 0 and done.stderr == ""
    assert [path.name for path in victim.iterdir()] == ["precious"]


# The Hub


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch, sound: Path, tmp_path: Path) -> Iterator[Any]:
    """A fake Hub with one repository, whose files the test lists."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    calls: list[dict[str, Any]] = []
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT

    class Hub:
        def __init__(self) -> None:
            self.files = ["config.json", "model.safetensors", "tokenizer.json"]
            self.contents = b"x"
            self.error: Exception | None = None

        def download(self, name: str, **options: Any) -> str:
            calls.append({"name": name, **options})
            if self.error:
                raise self.error
            patterns = {k: options.get(k) for k in ("allow_patterns", "ignore_patterns")}
            snapshot.mkdir(parents=True)
            for file in filter_repo_objects(self.files, **patterns):
                target = snapshot / file
                target.parent.mkdir(parents=True, exist_ok=True)
                known = sound / file
                target.write_bytes(known.read_bytes() if known.is_file() else self.contents)
            return str(snapshot)

    fake = Hub()
    fake.calls = calls
    fake.snapshot = snapshot
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    yield fake


def test_only_known_files_are_downloaded(listing: Any) -> None:
    listing.files = [
        *listing.files,
        "modeling_llava.py",
        "LICENSE.py",
        "LICENSE",
        "chat_template.jinja",
        "pytorch_model.bin",
        "model.pt",
        "sub/model.safetensors",
        "LICENSE/evil.py",
        "training_args.json",
        ".gitattributes",
    ]
    checkpoint = find_checkpoint("org/name")
    found = {p.relative_to(checkpoint.path).as_posix() for p in checkpoint.path.rglob("*")}
    assert found == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert checkpoint.revision == COMMIT
    assert "local_dir" not in listing.calls[0]


def test_revision_is_passed_on_and_recorded(listing: Any) -> None:
    assert find_checkpoint("org/name", "main").revision == COMMIT
    assert listing.calls[0]["revision"] == "main"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_download_is_reported(listing: Any, missing: str) -> None:
    listing.files = [name for name in listing.files if name != missing]
    with pytest.raises(CheckpointError, match=r"has no usable checkpoint.*connect and run"):
        find_checkpoint("org/name")


def test_missing_shard_is_reported(listing: Any, sound: Path) -> None:
    listing.files.append("model.safetensors.index.json")
    listing.contents = b'{"weight_map": {"x": "model-00002-of-00002.safetensors"}}'
    with pytest.raises(CheckpointError, match="has no usable checkpoint"):
        find_checkpoint("org/name")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left"),
        RuntimeError("a\n\x1b[2Jb"),
        ValueError(),
        TimeoutError(),
    ],
    ids=str,
)
def test_errors_of_the_client_are_one_line(listing: Any, error: Exception) -> None:
    listing.error = error
    with pytest.raises(ModelError) as caught:
        find_checkpoint("org/name")
    assert str(caught.value).isprintable()


def test_planted_directory_is_not_used(
    listing: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("org/name").path == listing.snapshot
    assert find_checkpoint("./org/name").path == Path("org/name")
