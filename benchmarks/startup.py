"""`python -m benchmarks.startup`: how long `import driving_sim` and `drivesim --help` take.

Runs each of them in a new Python process, in turns with a Python process that does nothing.
"""

import subprocess
import sys

import numpy as np

from benchmarks import ROOT
from benchmarks.measuring.paired import Benchmark, Claim, Figure, Settings, alternate, run_command


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def measure(settings: Settings) -> list[Claim]:
    """Return the seconds of the import and of the help, including the start of Python."""
    times = alternate(
        {
            "nothing": lambda: _run("-c", "pass"),
            "import driving_sim": lambda: _run("-c", "import driving_sim"),
            # The script `drivesim` does the same, but it exists only if the package is installed.
            "drivesim --help": lambda: _run("-m", "driving_sim.cli", "--help"),
        },
        settings,
    )
    nothing = float(np.median(times.pop("nothing")))
    return [
        Claim(
            what=f"`{name}`",
            figure=Figure.of(taken),
            bar=0.3,
            unit="s",
            at_most=True,
            details=(f"of which {nothing:.3f} s are the start of Python",),
        )
        for name, taken in times.items()
    ]


BENCHMARKS: dict[str, Benchmark] = {"startup": measure}


if __name__ == "__main__":
    run_command(__doc__, "startup", BENCHMARKS, sys.argv[1:])
