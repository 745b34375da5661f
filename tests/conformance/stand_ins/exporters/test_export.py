"""Stand-in: upstream's tests of its exporters; tests/test_onnx.py has those of this project."""


class ExportTesterMixin:
    """No tests."""
