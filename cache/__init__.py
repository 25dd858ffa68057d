"""Registry of adapters, and where their bytes are."""
