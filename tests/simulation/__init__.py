"""A whole LLM OS in one event loop with virtual time, crashed at every boundary."""
