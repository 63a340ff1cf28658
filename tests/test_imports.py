from __future__ import annotations

import subprocess
import sys

CORE = ", ".join(
    f"ttsnap.{name}"
    for name in ("core.grid", "core.ranking", "core.cost", "core.driver", "policies", "replay.environment")
)


def test_the_core_imports_without_torch():
    code = f"import sys; sys.modules['torch'] = None; import ttsnap, {CORE}, ttsnap.cli; assert callable(ttsnap.search)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_nothing_heavy():
    heavy = [
        "torch",
        "diffusers",
        "transformers",
        "xarray",
        "zarr",
        "scipy",
        "pandas",
        "optuna",
        "matplotlib",
        "PIL",
        "numpy",
    ]
    code = (
        "import sys, ttsnap.cli; sys.argv = ['ttsnap', '--help']\ntry:\n ttsnap.cli.main()\nexcept SystemExit: pass\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
