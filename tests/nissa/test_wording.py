import pytest

from esper.nissa.wording import count, duration, short


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (float("nan"), "nan"),
        ({"a": 1, "b": None}, "a 1, b –"),
        (["x", 2.0], "x, 2"),
        ("as it is", "as it is"),
    ],
)
def test_short(value: object, words: str) -> None:
    assert short(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (float("inf"), "–"),
        (0, "0"),
        (999, "999"),
        (1357, "1.36 k"),
        (1.8e9, "1.8 G"),
        (2e19, "20 E"),
    ],
)
def test_count(value: float | None, words: str) -> None:
    assert count(value) == words


@pytest.mark.parametrize(("value", "words"), [(None, "–"), (9.24, "9.2 s"), (245.0, "4 min 05 s")])
def test_duration(value: float | None, words: str) -> None:
    assert duration(value) == words
