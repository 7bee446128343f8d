"""`python -m benchmarks.startup`: how soon `import driving_sim` and `drivesim --help` are done.

Each in a new interpreter, in turns with one that does nothing.
"""

import subprocess
import sys

import numpy as np

from benchmarks import ROOT
from benchmarks.measuring.paired import Benchmark, Claim, Figure, Settings, alternate, run_command


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)


def measure(settings: Settings) -> list[Claim]:
    """Seconds of both, the interpreter's own start included."""
    found = alternate(
        {
            "nothing": lambda: _run("-c", "pass"),
            "import driving_sim": lambda: _run("-c", "import driving_sim"),
            # What the console script does, found wherever the package is installed.
            "drivesim --help": lambda: _run("-m", "driving_sim.cli", "--help"),
        },
        settings,
    )
    nothing = float(np.median(found.pop("nothing")))
    return [
        Claim(
            what=name,
            against="the clock",
            figure=Figure.of(times),
            bar=0.3,
            unit=" s",
            at_most=True,
            details=(f"{nothing:.3f} s of it is Python's own start",),
        )
        for name, times in found.items()
    ]


BENCHMARKS: dict[str, Benchmark] = {"startup": measure}


if __name__ == "__main__":
    run_command(__doc__, "startup", BENCHMARKS, sys.argv[1:])
