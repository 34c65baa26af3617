"""Library commands: output, exit status, HTML pages, hostile file names."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mobileclip import Library
from mlx_mobileclip.__main__ import main
from mlx_mobileclip.library.thumbnails import escape_sequence, terminal_protocol, thumbnail

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def test_search_output_and_exit_status(
    copied: Path, drawn: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def run(*options: str) -> tuple[int, bytes]:
        status = main(["search", "--index", str(copied), *options])
        return status, capfdbinary.readouterr().out

    same = str(drawn / "s05.png")
    assert run("--like", same, "--paths", "-k", "1") == (0, same.encode() + b"\n")
    assert run("--like", same, "-0", "-k", "1") == (0, same.encode() + b"\0")
    status, out = run("--like", same, "--json", "-k", "2", "--all")
    report = json.loads(out)
    assert status == 0 and report["results"][0]["path"] == same
    status, out = run("--like", same, "-k", "1")
    assert status == 0 and out.split()[-1].endswith(b"s05.png")
    assert run("a red circle", "--since", "2999") == (1, b"")
    assert run("a red circle", "--since", "never") == (2, b"")
    assert main(["search", "x", "--index", str(copied.with_name("none.db"))]) == 2


def test_search_starts_without_mlx(copied: Path, drawn: Path) -> None:
    code = (
        "import sys; from mlx_mobileclip.__main__ import main; "
        f"status = main(['search', '--like', {str(drawn / 's05.png')!r}, "
        f"'--index', {str(copied)!r}]); assert 'mlx.core' not in sys.modules; sys.exit(status)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)


HOSTILE_NAME = "<script>document.title='run'</script>\x1b[31m\u202e&\"'.png"


def index_hostile_names(few: Path, tmp_path: Path) -> Path:
    name = HOSTILE_NAME.replace("/", "\u2215")
    (few / "s0.png").rename(few / name)
    (few / "s1.png").rename(few / "with\nnewline.png")
    database = tmp_path / "hostile.db"
    with Library(database) as library:
        library.index(few, model="demo")
    return database


def test_hostile_names_are_escaped(
    few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, page = index_hostile_names(few, tmp_path), tmp_path / "page.html"
    assert main(["search", "--index", str(database)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\u202e" not in shown and len(shown.splitlines()) == 5
    assert main(["search", "--index", str(database), "--paths"]) == 2  # a newline in a name
    capsys.readouterr()
    assert main(["search", "<b>", "--all", "--index", str(database), "--html", str(page)]) == 0
    text = page.read_text()
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text
    assert html.escape("<script>") in text
    assert not re.search(r"""(?:src|href)=["'](?!data:|file:)""", text)
    before = page.read_text()
    other = tmp_path / "other.html"
    other.write_text("mine")
    assert main(["search", "--index", str(database), "--html", str(other)]) == 2
    assert main(["search", "--index", str(database), "--html", str(page)]) == 0
    assert other.read_text() == "mine" and page.read_text() != before


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_runs_no_script_in_chromium(few: Path, tmp_path: Path) -> None:
    database, page = index_hostile_names(few, tmp_path), tmp_path / "page.html"
    assert main(["search", "--index", str(database), "--html", str(page)]) == 0
    assert CHROMIUM
    # A preloaded BLAS keeps Chromium from starting its own processes.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *options, profile, page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.count("<img") == 5 and "<script>" not in done.stdout
    [title] = re.findall("<title>(.*)</title>", done.stdout)
    assert title == "photos"


def test_maintenance_commands(
    library: Library, few: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(few / "s0.png", few / "copy.png")
    assert main(["index", "--model", "demo", "--index", str(library.path), str(few)]) == 0
    index = ["--index", str(library.path)]
    assert not capsys.readouterr().out
    assert main(["dupes", *index, "--level", "exact", "--paths"]) == 0
    assert capsys.readouterr().out == f"{few / 's0.png'}\n"
    assert main(["status", *index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["photos"] == 6
    assert main(["verify", *index, "--files"]) == 0
    (few / "s2.png").write_bytes(b"changed")
    assert main(["verify", *index, "--files"]) == 1
    assert "s2.png" in capsys.readouterr().out
    moved = tmp_path / "moved"
    assert main(["relocate", *index, str(few), str(moved)]) == 1  # not there yet
    few.rename(moved)
    assert main(["relocate", *index, str(few), str(moved)]) == 0
    assert all(Path(path).parent == moved for path in library.search().paths)
    output = tmp_path / "photos.parquet"
    assert main(["export", *index, "--output", str(output)]) == 0
    from pyarrow import parquet

    table = parquet.read_table(output)
    assert table.num_rows == 6 and len(table["embedding"][0]) == 128
    assert sorted(table["path"].to_pylist()) == sorted(library.search().paths)
    assert main(["export", *index, "--output", str(output)]) == 1  # exists


def test_terminal_thumbnails(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = thumbnail(str(drawn / "s00.png"), 64)
    assert jpeg and jpeg[:2] == b"\xff\xd8"
    assert thumbnail(str(drawn / "gone.png")) is None
    kitty, iterm = escape_sequence(jpeg, "kitty"), escape_sequence(jpeg, "iterm2")
    parts = kitty.split("\x1b\\")[:-1]
    assert all(part.startswith("\x1b_G") and len(part) < 4200 for part in parts)
    assert "m=0;" in parts[-1] and all("m=1;" in part for part in parts[:-1])
    assert iterm.startswith("\x1b]1337;File=inline=1;") and iterm.endswith("\x07")
    for name in ("TERM", "TERM_PROGRAM", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    assert terminal_protocol() is None
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert terminal_protocol() == "kitty"
