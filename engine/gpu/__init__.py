"""The engine's step on a GPU. All of it also runs on CPU under Triton's interpreter, for tests."""
