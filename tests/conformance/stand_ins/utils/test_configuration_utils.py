"""Stand-in: values of common settings, which upstream does not try on composite configurations."""

config_common_kwargs: dict[str, object] = {}
