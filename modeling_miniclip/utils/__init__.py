"""Helpers that know nothing of models: files, HTML, pictures, memory."""
