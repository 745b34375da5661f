"""The package's errors, and errors of other libraries in its messages."""

import pickle
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from modeling_miniclip.errors import DataError, MiniClipError, Problem, did_you_mean, one_line, printable


def hub_error(status: int, text: str) -> HfHubHTTPError:
    return HfHubHTTPError(text, response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore


def test_an_error_is_one_line_with_the_network_error() -> None:
    try:
        try:
            raise HTTPError("Connection\n reset.")
        except HTTPError as error:
            raise OSError("cannot load\n\nthe model") from error
    except OSError as error:
        assert one_line(error) == "cannot load the model (HTTPError: Connection reset.)"
    assert one_line(OSError("cannot load.\n")) == "cannot load"
    assert one_line(KeyError()) == "KeyError"


def test_status_codes_of_the_hub_are_explained() -> None:
    assert one_line(hub_error(503, "Server error '503'")) == "the Hub is temporarily unavailable: Server error '503'"
    assert one_line(hub_error(403, "403 Forbidden")) == "this token does not have permission: 403 Forbidden"
    assert one_line(hub_error(404, "404 Not found")) == "404 Not found"


def test_tokens_and_signed_urls_are_hidden() -> None:
    text = one_line(
        "Illegal header value b'Bearer hf_secret\x0b', PUT 'https://cdn.hub/a/b?Expires=1&Signature=abc' "
        "(Request ID: 7f)"
    )
    assert text == "Illegal header value b'Bearer ***', PUT 'https://cdn.hub/a/b'"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({}, "a.csv: too short"),
        ({"row": 0}, "a.csv, row 0: too short"),
        ({"column": "text"}, "a.csv, column 'text': too short"),
        ({"row": 7, "column": "text", "image": "b.png"}, "a.csv, row 7, column 'text': too short"),
    ],
)
def test_a_problem_names_its_place(place: dict, expected: str) -> None:
    assert str(Problem("fields", "too short", "a.csv", **place)) == expected


def test_a_data_error_carries_its_problem() -> None:
    problem = Problem("fields", "too\nshort", "a.csv", 7)
    for error in (DataError(problem), pickle.loads(pickle.dumps(DataError(problem)))):
        assert error.problem == problem and str(error) == "a.csv, row 7: too short"
    assert DataError("no data").problem is None and str(DataError("no data")) == "no data"


def test_messages_have_no_line_breaks_control_characters_or_tokens() -> None:
    assert str(MiniClipError("one\n  two\x1b hf_" + "a1" * 17)) == "one two\\x1b hf_***"
    assert printable("a\u202eb é") == "a\\u202eb é"


def test_a_similar_name_is_suggested() -> None:
    assert did_you_mean("imgae", ["image", "text"]) == "; did you mean image?"
    assert did_you_mean("zzz", ["image", "text"], "; see --help") == "; see --help"
