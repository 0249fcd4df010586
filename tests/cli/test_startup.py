"""What needs no network must not wait for torch."""

import json

import pytest

#: In units of what the command line's libraries alone take, so that a slow or busy machine is forgiven.
LIMIT = 5.0
HEAVY = ("torch", "diffusers", "transformers", "triton", "numpy")
PROBE = f"""
import json, sys, time
started = time.process_time()
import typer, typer._adapters
libraries = time.process_time() - started
from suite.cli import main
code = main(sys.argv[1:])
seconds = time.process_time() - started
loaded = [m for m in {HEAVY} if m in sys.modules]
print(json.dumps({{"code": code, "times": seconds / libraries, "loaded": loaded}}), file=sys.stderr)
"""


@pytest.fixture
def probe(launch):
    def run(*words):
        started = launch("-c", PROBE, *words)
        _, err = started.communicate(timeout=60)
        return json.loads(err.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["image", "--help"],
        ["plugins", "list"],
        ["plugins", "show", "ddim"],
        ["schedule", "optimize", "--help"],
        ["bench", "solvers", "--help"],
        ["bench", "caches", "--help"],
    ],
)
def test_listings_load_nothing_heavy_and_are_quick(probe, words):
    first = probe(*words)
    assert (first["code"], first["loaded"]) == (0, [])
    # Measured again if it is over: what else runs on the machine counts little so, but not nothing.
    assert first["times"] <= LIMIT or probe(*words)["times"] <= LIMIT


@pytest.mark.parametrize(
    "words",
    [
        ["models", "list"],
        ["recipes", "list"],
        ["models", "show", "emoji-64"],
        ["image", "x", "--solver", "ddmi"],
        ["image", "x", "--model", "emoji-46"],
        ["image", "x", "-o", "absent/x.png"],
        ["image", ""],
        ["image", "x", "--steps", "0"],
        ["replay", "absent.png"],
    ],
)
def test_refusals_and_other_listings_load_no_torch(probe, words):
    assert "torch" not in probe(*words)["loaded"]


def test_a_modality_whose_module_is_light_is_refused_a_wrong_ending_without_torch(probe, model):
    outcome = probe("fake", "x", "--model", str(model), "-o", "x.mp4")
    assert outcome["code"] == 2 and "torch" not in outcome["loaded"]


def test_importing_the_package_loads_nothing(launch):
    started = launch("-c", "import sys, suite; print('torch' in sys.modules)")
    assert started.communicate(timeout=30)[0].strip() == "False"
