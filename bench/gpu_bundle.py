"""Makes a folder with everything that a GPU machine without network needs to test and time the kernels.

    python bench/gpu_bundle.py --wheels FOLDER --large FOLDER --out outputs/gpu_bundle      (`make gpu-bundle`)

It holds git's tracked files in their current state, the peers' wheels, and `run.sh`, the command to run there. Wheels
too large for one transfer are cut in parts: folders `outputs/gpu_bundle_part01` and so on. Put these beside the first,
and `run.sh` joins them. Without the parts the peers that need them get a row that says so.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from harness import REPOSITORY, commit

TAKEN = ("kernels", "tests/kernels", "bench/*.py", "bench/run.sh", "LICENSE")
MOST_MIB = 64  # what may be carried
PART_MIB = 48  # of a large wheel, to leave room for the rest


def bundle(out: Path, wheels: list[Path]) -> float:
    """Write the folder, replacing an old one, and return its size in MiB."""
    if out.exists():
        shutil.rmtree(out)
    known = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "--", *TAKEN]
    for name in subprocess.run(known, capture_output=True, text=True, check=True).stdout.splitlines():
        # git also lists files that were deleted but not yet committed.
        if (REPOSITORY / name).exists():
            target = out / ("run.sh" if name == "bench/run.sh" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target)
    (out / "COMMIT").write_text(f"{commit()}\n")
    (out / "wheels").mkdir()
    for wheel in wheels:
        shutil.copy(wheel, out / "wheels")
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20


def parts(out: Path, wheels: list[Path], most: int) -> list[Path]:
    """Write the wheels into numbered folders beside `out`, `most` bytes in each, and return the folders.

    A piece has the name of its wheel and the number of its folder. Folders of an earlier call are removed.
    """
    for old in out.parent.glob(f"{out.name}_part*"):
        shutil.rmtree(old)
    folders: list[Path] = []
    left = 0
    for wheel in wheels:
        content = wheel.read_bytes()
        while content:
            if not left:
                folders.append(out.with_name(f"{out.name}_part{len(folders) + 1:02}"))
                folders[-1].mkdir(parents=True)
                left = most
            piece, content = content[:left], content[left:]
            (folders[-1] / f"{wheel.name}.{len(folders):02}").write_bytes(piece)
            left -= len(piece)
    return folders


def main() -> None:
    """Make the folder and print its size; the exit code is 1 if it is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the peers' wheels")
    parser.add_argument("--large", type=Path, help="folder of wheels that are carried in parts")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "gpu_bundle")
    options = parser.parse_args()
    wheels = sorted(options.wheels.glob("*.whl"))
    size = bundle(options.out, wheels)
    if size > MOST_MIB:
        raise SystemExit(f"{options.out}: {size:.1f} MiB: at most {MOST_MIB} can be carried. Take wheels away.")
    print(f"{options.out}: {size:.1f} MiB with {len(wheels)} peers. There: OUT=results bash run.sh")
    large = sorted(options.large.glob("*.whl")) if options.large else []
    for part in parts(options.out, large, PART_MIB * 2**20):
        print(f"{part}: put it beside that folder; at most {PART_MIB} MiB of what Liger's CuTe kernel and QuACK need")


if __name__ == "__main__":
    main()
