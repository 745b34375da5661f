"""Stand-in: upstream's tests of `generate`, which a model without language head has not."""


class GenerationTesterMixin:
    """No tests."""
