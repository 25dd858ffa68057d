"""Sequences, the step loop, one base model shared by every adapter."""
