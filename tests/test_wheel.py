"""The wheel alone: built from the tracked files and unpacked into an environment without the checkout."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines():
        if (
            name.startswith(("hapo_verl/", "kernels/", "pyproject.toml", "README.md", "LICENSE"))
            and (ROOT / name).exists()
        ):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter that sees this environment's libraries and the wheel, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files are not read, and these name the checkout.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "VERL_PLATFORM": "cpu",
    }
    return subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_contains_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (("hapo_verl", ROOT), ("hapo_kernels", ROOT / "kernels")):
        for path in (folder / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".typed") or path.name == "py.typed":
                assert str(path.relative_to(folder)) in names
    assert not [name for name in names if name.startswith(("tests", "bench", "recipes", "docs"))]


def test_packages_presets_and_entry_points_are_found_outside_the_checkout(python, tmp_path):
    code = (
        "import importlib.metadata as metadata, hapo_verl, hapo_kernels\n"
        "print(hapo_verl.__file__, hapo_kernels.__file__, sep='\\n')\n"
        "for group in ('verl.plugins', 'vllm.general_plugins'):\n"
        "    for entry in metadata.entry_points(group=group):\n"
        "        if entry.value.startswith('hapo'):\n"
        "            print(group, entry.load() is not None)\n"
    )
    done = run(python, "-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    files, entries = done.stdout.splitlines()[-4:-2], done.stdout.splitlines()[-2:]
    assert all(str(python.parents[1]) in file for file in files)
    assert entries == ["verl.plugins True", "vllm.general_plugins True"]


def test_the_doctor_runs_from_the_wheel_with_exit_code_0_and_only_ok_lines(python, tmp_path):
    done = run(python, "-m", "hapo_verl.doctor", "--no-ray", folder=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok  ", "FAIL"))]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 13
    assert all(line.startswith("ok  ") for line in lines)
