"""Stand-in: upstream's tests of its exporters; tests/hub/test_onnx_export.py has those of this project."""


class ExportTesterMixin:
    """No tests."""
