"""Agent programs, and the base class they derive from."""
