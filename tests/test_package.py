"""What is installed: the wheel holds everything that is read at run time, and `import lutq` costs nothing."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest

import lutq
from lutq.build import BUNDLED, FLAGS, Library, read_library, source_hash
from lutq.compiler import FAT_ARCHS
from lutq.paths import ASSETS, PACKAGE, shipped

ROOT = Path(__file__).resolve().parent.parent


def copy_of_tree(folder):
    """What of this working tree a build reads, in a folder of its own, without compiled kernels."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("lutq", "kernels", "configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "lutq_cuda.*"))
    return folder


def pip_wheel(source, folder):
    """The wheel that pip makes of a tree or an sdist. Skips where hatchling is neither installed nor to be had."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", folder, source]
    if found := importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if result.returncode:
        words = ("No module named pip", "hatchling", "Could not find a version", "connection", "Network")
        assert not found, result.stderr
        assert any(word in result.stderr for word in words), result.stderr
        pytest.skip(f"no wheel can be built here: {result.stderr.strip().splitlines()[-1]}")
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this working tree, without compiled kernels."""
    tree = copy_of_tree(tmp_path_factory.mktemp("source") / "lutq")
    before = sorted(tree.iterdir())
    file = pip_wheel(tree, tmp_path_factory.mktemp("wheel"))
    assert sorted(tree.iterdir()) == before, "building wrote into the working tree"
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
        if "__pycache__" not in path.parts and path.suffix != ".pyc" and path.stem != "lutq_cuda":
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


# A wheel that carries compiled kernels


@pytest.fixture
def tree(tmp_path):
    """A copy of this working tree with what `lutq build --out kernels` leaves there, as far as files tell."""
    pytest.importorskip("hatchling")
    folder = copy_of_tree(tmp_path / "lutq")
    path = folder / "kernels" / BUNDLED
    digest = source_hash(path.parent)
    path.write_bytes(b"a library of " + digest.encode())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    made = asdict(Library(path, ("sm_90",), digest, FLAGS, platform.machine(), "nvcc", "nvcc", 1.0, sha256))
    path.with_suffix(".json").write_text(json.dumps(made | {"path": None}))
    path.with_suffix(".log").write_text("")
    return folder


def hatch(tree, target, out, version="standard"):
    """Let hatch build an sdist or a wheel where torch cannot be imported, as in an isolated build."""
    blocker = tree.parent / "blocker"
    blocker.mkdir(exist_ok=True)
    (blocker / "torch.py").write_text("raise ImportError('lutq is built without torch')")
    command = [sys.executable, "-m", "hatchling", "build", "-t", f"{target}:{version}", "-d", out]
    environment = os.environ | {"PYTHONPATH": str(blocker)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("way", ["straight", "from the sdist"])
def test_wheel_carries_the_library(tree, tmp_path, way):
    source = tree
    if way == "from the sdist":
        result = hatch(tree, "sdist", tmp_path)
        assert result.returncode == 0, result.stderr
        source = tmp_path / f"lutq-{lutq.__version__}.tar.gz"
    (tmp_path / "out").mkdir()
    wheel = pip_wheel(source, tmp_path / "out")
    tag = f"py3-none-{sysconfig.get_platform().translate(str.maketrans('-.', '__'))}"
    assert wheel.name == f"lutq-{lutq.__version__}-{tag}.whl", wheel.name
    found = contents(wheel)
    for suffix in (".so", ".json", ".log"):
        name = f"kernels/lutq_cuda{suffix}"
        assert found[f"lutq/{name}"] == (tree / name).read_bytes(), name
    words = found[f"lutq-{lutq.__version__}.dist-info/WHEEL"].decode()
    assert f"Tag: {tag}\n" in words, words
    assert "Root-Is-Purelib: false\n" in words, words


def test_sdist_without_a_library(tree, tmp_path):
    for path in (tree / "kernels").glob("lutq_cuda.*"):
        path.unlink()
    result = hatch(tree, "sdist", tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "out").mkdir()
    wheel = pip_wheel(tmp_path / f"lutq-{lutq.__version__}.tar.gz", tmp_path / "out")
    assert wheel.name == f"lutq-{lutq.__version__}-py3-none-any.whl", wheel.name
    assert not [name for name in contents(wheel) if "lutq_cuda" in name]


def change(name):
    return lambda kernels: (kernels / name).write_text((kernels / name).read_text() + " ")


@pytest.mark.parametrize("target", ["sdist", "wheel"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("layout.cuh"), "stale: made from other sources or with other flags"),
        (lambda kernels: (kernels / BUNDLED).write_bytes(b"other"), "damaged"),
        (lambda kernels: (kernels / "lutq_cuda.json").unlink(), "incomplete"),
        (lambda kernels: (kernels / BUNDLED).unlink(), "incomplete"),
    ],
    ids=["stale", "damaged", "no record", "no library"],
)
def test_a_library_that_would_not_be_used_is_not_packed(tree, tmp_path, target, spoil, words):
    spoil(tree / "kernels")
    result = hatch(tree, target, tmp_path / "out")
    assert result.returncode == 1, result.stdout
    remedy = "run `lutq build --out kernels` again (with --arch all for GPUs of every kind), or delete kernels/lutq_cuda.*"
    assert f"kernels/lutq_cuda.so is {words}: {remedy}" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert not list((tmp_path / "out").glob("*")), "something was built all the same"


def test_editable_install_beside_a_stale_library(tree, tmp_path):
    change("layout.cuh")(tree / "kernels")
    result = hatch(tree, "wheel", tmp_path / "out", version="editable")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name == f"lutq-{lutq.__version__}-py3-none-any.whl", wheel.name


def test_arch_all(monkeypatch, tmp_path):
    """On a machine with a GPU, `all` is every architecture nevertheless; the compiler is a script that notes what it is told."""
    from typer.testing import CliRunner

    from lutq.cli import app
    from lutq.doctor import Gpu

    monkeypatch.setattr("lutq.doctor.gpus", lambda: [Gpu(0, "", (9, 0), 0)])
    monkeypatch.setattr("lutq.compiler.host_compiler", lambda: "g++")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("""#!/bin/sh
[ "$1" = --version ] && { echo "release 13.0"; exit 0; }
while [ $# -gt 0 ]; do case "$1" in -o) out=$2 ;; -D*) define=$1 ;; esac; shift; done
echo "$define" > "$out"
""")
    nvcc.chmod(0o755)
    result = CliRunner().invoke(app, ["build", "--arch", "all", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "compute_80, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, compiled" in result.stdout, result.stdout
    assert "once (about 5 minutes on two cores, less on more)" in result.stderr, result.stderr
    made = read_library(tmp_path / "out" / BUNDLED)
    assert set(made.archs) == set(FAT_ARCHS)
    assert all(flag in made.command for flag in ("code=sm_90a", "code=sm_120", "code=compute_80")), made.command
    usage = CliRunner().invoke(app, ["build", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert all(arch in usage for arch in (*FAT_ARCHS, "all of these")), usage


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
