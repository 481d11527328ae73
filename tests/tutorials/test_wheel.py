"""The lessons and the screen's gallery travel in the wheel: built, unpacked far from the checkout, and used there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from minipaged.learn.catalog import lessons, tutorials_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install .` puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def minipaged(site: Path, *words: object, cwd: Path) -> str:
    """Run a command of the unpacked package; nothing of the checkout is in sight."""
    command = [sys.executable, "-m", "minipaged", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_lesson_is_in_the_wheel(unpacked: Path) -> None:
    shipped = unpacked / "minipaged" / "tutorials"
    here = tutorials_folder()
    for path in [p for p in here.rglob("*") if p.suffix in (".py", ".toml", ".md")]:
        assert (shipped / path.relative_to(here)).read_bytes() == path.read_bytes()
    assert not (unpacked / "tutorials").exists(), "a name of its own in site-packages could hide somebody else's"


@pytest.mark.slow
def test_a_lesson_can_be_taken_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    assert f"{len(lessons()) + 2} files copied" in minipaged(
        unpacked, "learn", "start", tmp_path / "mine", cwd=tmp_path
    )
    mine = tmp_path / "mine"
    solved = minipaged(unpacked, "learn", "solution", 4, "--whole", "--yes", cwd=mine)
    assert solved == lessons()[3].solved()
    (mine / lessons()[3].path.name).write_text(solved, encoding="utf-8")
    assert "3 of 3 tasks" in minipaged(unpacked, "learn", "check", 4, cwd=mine)
    assert "table[" in minipaged(unpacked, "learn", "solution", 4, "--task", 1, "--yes", cwd=mine)
    assert "hint 1 of 3" in minipaged(unpacked, "learn", "hint", 5, cwd=mine)
    assert "Right: L12" in minipaged(unpacked, "learn", "break", 1, "--answer", "L12", "--headless", cwd=mine)
    picture = mine / "screen.svg"
    minipaged(unpacked, "learn", "show", 4, "--headless", "--screenshot", picture, cwd=mine)
    assert "<svg" in picture.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_gallery_is_in_the_wheel(unpacked: Path) -> None:
    here = ROOT / "tui"
    for path in [p for p in here.rglob("*") if p.suffix in (".mpt", ".tcss", ".svg")]:
        assert (unpacked / "minipaged" / "tui" / path.relative_to(here)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_one_name_is_installed(unpacked: Path) -> None:
    """Hugging Face publishes a package `kernels`: a second name in site-packages would break it, or be broken by it."""
    assert [path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"] == ["minipaged"]
    assert not [path for path in unpacked.rglob("*") if path.is_symlink()]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_holds_the_same_files(unpacked: Path, tmp_path: Path) -> None:
    """Links of the checkout do not survive every archive; what is installed must not depend on them."""
    code = "from hatchling.build import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    pytest.importorskip("hatchling")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(sdist)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        again = {name for name in archive.namelist() if ".dist-info" not in name}
    assert again == {
        path.relative_to(unpacked).as_posix() for path in unpacked.glob("minipaged/**/*") if path.is_file()
    }


def test_a_package_named_kernels_is_not_hidden_by_the_checkout(tmp_path: Path) -> None:
    """From the repository's root too: the folder kernels/ has no __init__.py, so a real package of that name goes before it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'theirs'")
    code = "import kernels, minipaged.kernels.cache as ours; print(kernels.WHOSE, ours.write_kv.__module__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "theirs minipaged.kernels.cache.cache_write\n", done.stderr
