"""Readers: files and folders into passages."""
