"""Tools: what agents may call outside."""
