"""Times what the command line answers without any work: --help, --version, a slip of the pen.

    python benchmarks/startup.py

User CPU seconds of a whole process, the median of 7 in turn, against `python -c pass`. Writes
benchmarks/results/startup.json.
"""

import os
import statistics
import subprocess
import sys

import record

ROUNDS = 7
ASKED = {
    "pass": ["-c", "pass"],
    "--help": ["-m", "jlora.cli", "--help"],
    "--version": ["-m", "jlora.cli", "--version"],
    "trian": ["-m", "jlora.cli", "trian"],
    "train --help": ["-m", "jlora.cli", "train", "--help"],
    "generate --help": ["-m", "jlora.cli", "generate", "--help"],
}


def user_seconds(arguments: list[str]) -> float:
    """Return the user CPU seconds of one process."""
    before = os.times().children_user
    subprocess.run([sys.executable, *arguments], capture_output=True, cwd=record.ROOT)
    return os.times().children_user - before


def main() -> None:
    """Time each in turn, print and write the medians."""
    seconds: dict[str, list[float]] = {name: [] for name in ASKED}
    for turn in range(ROUNDS + 1):  # the first, which compiles and reads files, is not counted
        for name, arguments in ASKED.items():
            taken = user_seconds(arguments)
            if turn:
                seconds[name].append(taken)
    result = {
        "rounds": ROUNDS,
        "versions": record.versions(["jlora", "tyro", "pydantic", "numpy"]),
        "user_seconds": {
            name: {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for name, each in seconds.items()
        },
    }
    for name, each in seconds.items():
        print(f"{name:16} {statistics.median(each):.2f} s ({min(each):.2f} to {max(each):.2f})")
    print(record.write("startup", "python benchmarks/startup.py", result))


if __name__ == "__main__":
    main()
