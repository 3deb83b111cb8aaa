"""Rule engines."""
