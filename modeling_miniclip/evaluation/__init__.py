"""Retrieval and zero-shot metrics, evaluation sets, other CLIPs as baselines."""
