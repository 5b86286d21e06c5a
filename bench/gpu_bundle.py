"""Makes a folder with everything that a GPU machine without network needs to test and time the kernels.

    python bench/gpu_bundle.py --wheels FOLDER --out outputs/gpu_bundle      (`make gpu-bundle`)

It holds git's tracked files in their current state, the peers' wheels, and `run.sh`, the command to run there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

from harness import REPOSITORY, commit

TAKEN = ("kernels", "tests/kernels", "bench/*.py", "bench/run.sh", "LICENSE")
MOST_MIB = 64  # what may be carried


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


def main() -> None:
    """Make the folder and print its size; the exit code is 1 if it is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of the peers' wheels")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "gpu_bundle")
    options = parser.parse_args()
    wheels = sorted(options.wheels.glob("*.whl"))
    size = bundle(options.out, wheels)
    if size > MOST_MIB:
        raise SystemExit(f"{options.out}: {size:.1f} MiB: at most {MOST_MIB} can be carried. Take wheels away.")
    print(f"{options.out}: {size:.1f} MiB with {len(wheels)} peers. There: OUT=results bash run.sh")


if __name__ == "__main__":
    main()
