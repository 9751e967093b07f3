"""What is installed: the wheel holds everything that is read at run time, and `import lutq` costs nothing."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lutq
from lutq.paths import ASSETS, PACKAGE, shipped

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this working tree. Skips where hatchling is neither installed nor to be had."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    before = sorted(ROOT.iterdir())
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if result.returncode:
        words = ("No module named pip", "hatchling", "Could not find a version", "connection", "Network")
        assert any(word in result.stderr for word in words), result.stderr
        pytest.skip(f"no wheel can be built here: {result.stderr.strip().splitlines()[-1]}")
    assert sorted(ROOT.iterdir()) == before, "building wrote into the working tree"
    (file,) = folder.glob("*.whl")
    return file


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        content = {name: archive.read(name) for name in names}
    assert wheel.name == f"lutq-{lutq.__version__}-py3-none-any.whl", f"{wheel.name}"
    files = [
        path for path in (*PACKAGE.rglob("*"), *(ROOT / "kernels").rglob("*"), *(ROOT / "configs").rglob("*")) if path.is_file()
    ]
    for path in files:
        if "__pycache__" not in path.parts and path.suffix != ".pyc":
            name = path.relative_to(ROOT) if PACKAGE in path.parents else Path("lutq") / path.relative_to(ROOT)
            assert name.as_posix() in names, f"{name} is not in the wheel"
            assert content[name.as_posix()] == path.read_bytes(), f"{name} differs in the wheel"
    required = (
        "kernels/README.md",
        "configs/default.toml",
        "configs/mixed-3bit.toml",
        "configs/rtn-4bit.toml",
        "assets/NOTICE.md",
    )
    for name in (
        *required,
        "assets/wikitext2-raw-test.txt",
        "assets/opt-tiny/model.safetensors",
        "assets/opt-tiny/tokenizer.json",
    ):
        assert f"lutq/{name}" in names, f"{name} is not in the wheel"
    info = f"lutq-{lutq.__version__}.dist-info"
    licenses = {Path(name).name for name in names if name.startswith(f"{info}/licenses/")}
    assert {"LICENSE", "NOTICE.md"} <= licenses, f"{licenses}"
    assert b"lutq = lutq.cli:main" in content[f"{info}/entry_points.txt"], f"{content[f'{info}/entry_points.txt']}"
    strays = [name for name in names if not name.startswith(("lutq/", info)) or "__pycache__" in name]
    assert not strays, f"{strays}"


def test_wheel_works_from_anywhere(wheel, tmp_path):
    # unpacked away from the repository, as pip would install it
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import lutq
from lutq.config import make_config
from lutq.paths import ASSETS, shipped
print(lutq.__file__, shipped("configs"), shipped("kernels"), ASSETS, sep="\\n")
assert make_config("rtn-4bit").method == "rtn"
"""
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site" / "lutq"
    expected = [site / "__init__.py", site / "configs", site / "kernels", site / "assets"]
    assert [Path(line).resolve() for line in result.stdout.split("\n")[:4]] == [path.resolve() for path in expected], (
        result.stdout
    )


@pytest.mark.parametrize(("folder", "file"), [("configs", "default.toml"), ("kernels", "README.md")])
def test_shipped(folder, file):
    assert (shipped(folder) / file).is_file(), f"{folder=} {shipped(folder)=}"


def test_shipped_without_the_folder():
    with pytest.raises(FileNotFoundError, match="'no-such' is missing: reinstall lutq"):
        shipped("no-such")


def test_default_recipe_is_the_default():
    from lutq.config import FIELDS, QuantConfig, make_config, read_recipe

    assert make_config("default") == make_config() == QuantConfig()
    assert set(read_recipe("default")) == set(FIELDS) - {"overrides"}, "the recipe names every setting"


def test_attribution():
    notice = (ASSETS / "NOTICE.md").read_text(encoding="utf-8")
    for word in ("opt-tiny", "wikitext2-raw-test.txt", "books.txt", "CC BY-SA 3.0", "1609.07843"):
        assert word in notice, f"{word=}"
    data = {path.name for path in ASSETS.iterdir() if path.name != "NOTICE.md"}
    assert data == {"opt-tiny", "wikitext2-raw-test.txt", "books.txt"}, f"{data}: is it all in NOTICE.md?"


def test_version():
    assert importlib.metadata.version("lutq") == lutq.__version__


def test_import_is_light(tmp_path):
    code = """
import sys, lutq
heavy = {"torch", "transformers", "safetensors", "numpy", "datasets", "typer"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert set(lutq.__all__) <= {*dir(lutq), *lutq._HOME}
print(lutq.QuantConfig().bits, lutq.LutqError.__name__)
assert not heavy & set(sys.modules), heavy & set(sys.modules)
try:
    lutq.no_such_name
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "3 LutqError\nmodule 'lutq' has no attribute 'no_such_name'\n", result.stdout
