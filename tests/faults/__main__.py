"""`make faults`: every promise with its figure, within a quarter of an hour.

The soak takes ten minutes of one core. On the others runs meanwhile what measures no time, two
files on each, since most of it waits; what does measure has the machine to itself afterwards.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

FOLDER = Path(__file__).parent
FIRST = "test_soak.py"  # the longest
PYTEST = [sys.executable, "-m", "pytest", "--durations=0", "--durations-min=5"]
NOTHING_TO_RUN = 5  # pytest's code where all of a file's tests are timed


def main() -> int:
    """Run the tests; return 0 if every promise holds."""
    first, *others = sorted(os.sched_getaffinity(0))
    free = [*others, *others, first]  # the last one is taken first
    files = sorted(FOLDER.glob("test_*.py"), key=lambda file: (file.name != FIRST, file.name))
    codes = []

    def take_core() -> None:
        os.sched_setaffinity(0, {free.pop()})  # this thread's, and of what it starts

    with ThreadPoolExecutor(len(free), initializer=take_core) as pool:
        running = [pool.submit(_untimed, file) for file in files]
        for done in tqdm(as_completed(running), total=len(files), unit="file", disable=None):
            code, output = done.result()
            if code != NOTHING_TO_RUN:
                tqdm.write(output)
                codes.append(code)
    codes.append(subprocess.call([*PYTEST, FOLDER, "-m", "timed"]))
    return max(map(abs, codes))


def _untimed(file: Path) -> tuple[int, str]:
    """Run what measures no time in `file`; return pytest's code and all that it printed."""
    command = [*PYTEST, "-p", "no:cacheprovider", str(file), "-m", "not timed"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


if __name__ == "__main__":
    sys.exit(main())
