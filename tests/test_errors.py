"""Errors of other libraries, told in the package's own sentences."""

from types import SimpleNamespace

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from modeling_miniclip.errors import one_line


def hub_error(status: int, text: str) -> HfHubHTTPError:
    return HfHubHTTPError(text, response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore


def test_an_error_is_one_line_that_says_what_the_network_said() -> None:
    try:
        try:
            raise HTTPError("Connection\n reset.")
        except HTTPError as error:
            raise OSError("cannot load\n\nthe model") from error
    except OSError as error:
        assert one_line(error) == "cannot load the model (HTTPError: Connection reset.)"
    assert one_line(OSError("cannot load.\n")) == "cannot load"
    assert one_line(KeyError()) == "KeyError"


def test_an_answer_of_the_hub_is_told_by_its_meaning_and_its_text() -> None:
    assert one_line(hub_error(503, "Server error '503'")) == "the Hub is temporarily unavailable: Server error '503'"
    assert one_line(hub_error(403, "403 Forbidden")) == "this token does not have permission: 403 Forbidden"
    assert one_line(hub_error(404, "404 Not found")) == "404 Not found"


def test_no_token_and_no_signed_address_is_told() -> None:
    told = one_line(
        "Illegal header value b'Bearer hf_secret\x0b', PUT 'https://cdn.hub/a/b?Expires=1&Signature=abc' "
        "(Request ID: 7f)"
    )
    assert told == "Illegal header value b'Bearer ***', PUT 'https://cdn.hub/a/b'"
