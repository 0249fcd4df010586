"""Request options: what a modality declares is what people may choose, and nothing else."""

import pytest

from suite.errors import ConfigError
from suite.request import Request, RequestOption, resolve

FRAMES = RequestOption("frames", int, "Frames of the clip.", default=16, low=1, high=32)
SECONDS = RequestOption("seconds", float, "Length.", low=0.5)
WAY = RequestOption("distill", str, "How.", default="sds", choices=("sds", "vsd"))
DECLARED = (FRAMES, SECONDS, WAY, RequestOption("loop", bool, "Make it loop."))


def test_defaults_fill_what_is_not_said():
    assert resolve(DECLARED, None, "m") == {"frames": 16, "seconds": None, "distill": "sds", "loop": None}
    assert resolve(DECLARED, {"frames": None}, "m")["frames"] == 16


def test_a_whole_number_is_a_number():
    value = resolve(DECLARED, {"seconds": 2}, "m")["seconds"]
    assert value == 2.0 and type(value) is float


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 33}, "--frames 33: expected a whole number from 1 to 32"),
        ({"frames": 0}, "from 1 to 32"),
        ({"frames": 2.5}, "--frames 2.5: expected a whole number"),
        ({"frames": True}, "expected a whole number"),
        ({"frames": "4"}, "expected a whole number"),
        ({"seconds": 0.1}, "--seconds 0.1: expected a number from 0.5"),
        ({"seconds": float("nan")}, "expected a number from 0.5"),
        ({"distill": "sdd"}, "--distill 'sdd': expected one of sds, vsd"),
        ({"loop": 1}, "--loop 1: expected true or false"),
        ({"frame": 3}, "modality m has no option 'frame'"),
        ({"zzz": 3}, "it has frames, seconds, distill, loop"),
    ],
)
def test_refusals_say_what_is_expected(given, message):
    with pytest.raises(ConfigError) as refused:
        resolve(DECLARED, given, "m")
    assert message in str(refused.value)


def test_a_modality_without_options_says_so():
    with pytest.raises(ConfigError, match="it has none"):
        resolve((), {"frames": 3}, "m")


def test_the_request_counts_its_prompts():
    assert Request(("a", "b")).batch == 2
