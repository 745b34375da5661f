"""Stand-in, in upstream's `utils`: where a URL's file was stored; only chat templates ask."""


def url_to_local_path(url: str) -> str:
    """The URL itself."""
    return url
