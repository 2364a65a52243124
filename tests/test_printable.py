"""What comes from outside is shown so that no terminal obeys it, and short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import BlueprintError, ConfigError, MissingExtraError, nearest
from esper.printable import QUOTE, printable, quoted, shortened

HOSTILE = "\x1b[31mRED\x1b]0;t\x07\u202e\x9b1m\x7f\u200b\ud800"


def test_what_a_terminal_obeys_becomes_visible() -> None:
    assert printable(HOSTILE) == r"\x1b[31mRED\x1b]0;t\x07\u202e\x9b1m\x7f\u200b\ud800"
    assert printable("två\tαβ 漢字 →\n") == "två\tαβ 漢字 →\n"
    assert printable("two\nlines", keep="") == r"two\nlines"


@given(st.text(st.characters()))
def test_nothing_unprintable_is_left(text: str) -> None:
    assert printable(text, keep="").isprintable()
    assert printable(printable(text)) == printable(text)


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, HOSTILE * 50, [["x" * 99] * 99] * 99, 10**9999, Odd(), {"a": Odd()}, b"\0" * 999],
    ids=["long", "hostile", "nested", "digits", "raises", "within", "bytes"],
)
def test_a_quote_is_short_and_printable(value: object) -> None:
    assert len(quoted(value)) <= QUOTE
    assert quoted(value).isprintable()


def test_a_long_text_says_how_much_is_left_out() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcde", 3) == "abc… (2 characters more)"


@pytest.mark.parametrize("error", [ConfigError, BlueprintError])
def test_every_error_is_printable_and_readable(error: type[Exception]) -> None:
    assert str(error(f"no {HOSTILE}")).isprintable()
    assert len(str(error("x" * 1_700_000))) < 21_000
    assert error("as it was").args == ("as it was",)


def test_errors_of_the_builtin_kinds_keep_their_words() -> None:
    assert str(MissingExtraError("jinja2", "report", "this")).startswith("this needs jinja2; install it")


def test_of_very_many_known_names_some_are_listed() -> None:
    told = nearest("n7", [f"n{number}" for number in range(1000)])
    assert told.startswith("did you mean 'n7'? known: n0, n1, ")
    assert told.endswith(" and 900 more")
