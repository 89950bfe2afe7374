"""`make faults`: every promise with its figure, within a quarter of an hour.

The soak takes ten minutes of one core. Beside it, on the others, runs what measures no time; what
does has the machine to itself afterwards.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOAK = FOLDER / "test_soak.py"
PYTEST = [sys.executable, "-m", "pytest", "--durations=0", "--durations-min=5"]


def main() -> int:
    """Run the tests; return 0 if every promise holds."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return subprocess.call([*PYTEST, FOLDER, "-m", "slow or not slow"])
    with tempfile.TemporaryFile("w+") as output:
        os.sched_setaffinity(0, cores[:1])  # which a process hands on to those that it starts
        soak = subprocess.Popen(
            [*PYTEST, SOAK, "-m", "slow"], stdout=output, stderr=subprocess.STDOUT
        )
        os.sched_setaffinity(0, cores[1:])
        codes = [subprocess.call([*PYTEST, FOLDER, "-m", "not timed", f"--ignore={SOAK}"])]
        os.sched_setaffinity(0, cores)
        sys.stdout.write("waiting for the end of the soak …\n")
        sys.stdout.flush()
        codes.append(soak.wait())
        output.seek(0)
        sys.stdout.write(output.read())
        sys.stdout.flush()
    codes.append(subprocess.call([*PYTEST, FOLDER, "-m", "timed"]))
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
