"""Rotary position embedding of a step's queries and keys, in one launch."""
