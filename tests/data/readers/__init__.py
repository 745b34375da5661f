"""Readers, one test file per kind of source."""
