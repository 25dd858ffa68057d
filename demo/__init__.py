"""The demo base, the demo adapters, and how they were trained. `python -m demo` shows them all at once."""
