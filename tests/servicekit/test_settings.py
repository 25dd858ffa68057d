"""Settings from flags and variables."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields

import pytest

from servicekit.errors import StartupError
from servicekit.settings import read_settings, setting, variable


@dataclass(frozen=True)
class Settings:
    """The thing: what it is for."""

    listen: str = setting("127.0.0.1:1", "Address to listen on.")
    engines: tuple[str, ...] = setting(("a:1",), "Address of an engine; may be repeated.")
    max_queued: int = setting(100, "Most requests that wait.")
    weight: float = setting(1.0, "Weight.")
    warm: bool = setting(False, "Warm up.")

    def __post_init__(self) -> None:
        if self.max_queued < 1:
            raise ValueError("max_queued must be at least 1")


def read(*argv: str, **environ: str) -> Settings:
    return read_settings(Settings, "thing", argv, {f"LORAPLEX_THING_{key}": value for key, value in environ.items()})


def test_defaults_without_flags_and_variables() -> None:
    assert read() == Settings()


def test_each_type_from_a_flag() -> None:
    given = read(
        "--listen", ":9", "--engines", "b:2", "--engines", "c:3", "--max-queued=7", "--weight", "0.5", "--warm"
    )
    assert given == Settings(":9", ("b:2", "c:3"), 7, 0.5, True)


def test_each_type_from_a_variable() -> None:
    given = read(LISTEN=":9", ENGINES="b:2,c:3", MAX_QUEUED="7", WEIGHT="0.5", WARM="yes")
    assert given == Settings(":9", ("b:2", "c:3"), 7, 0.5, True)


def test_a_flag_wins_over_its_variable_also_when_it_says_no() -> None:
    given = read("--max-queued", "1", "--engines", "x:1", "--no-warm", MAX_QUEUED="7", ENGINES="b:2,c:3", WARM="true")
    assert (given.max_queued, given.engines, given.warm) == (1, ("x:1",), False)


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert read(LISTEN="", MAX_QUEUED="", ENGINES="", WARM="") == Settings()


@pytest.mark.parametrize("word", ["1", "true", "YES", "True"])
def test_words_for_true(word: str) -> None:
    assert read(WARM=word).warm


@pytest.mark.parametrize("word", ["0", "false", "No"])
def test_words_for_false(word: str) -> None:
    assert not read(WARM=word).warm


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"MAX_QUEUED": "many"}, "LORAPLEX_THING_MAX_QUEUED: 'many' is not a int"),
        ({"MAX_QUEUED": "1.5"}, "LORAPLEX_THING_MAX_QUEUED"),
        ({"WEIGHT": "heavy"}, "LORAPLEX_THING_WEIGHT"),
        ({"WARM": "maybe"}, "neither true nor false"),
        ({"MAX_QUEUED": "0"}, "max_queued must be at least 1"),
    ],
)
def test_a_malformed_variable_is_a_startup_error_that_names_it(environ: dict[str, str], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        read(**environ)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--max-queued", "many"], "--max-queued"),
        (["--listen"], "--listen"),
        (["--unknown", "1"], "--unknown"),
        (["--engine", "b:2"], "--engine"),
        (["stray"], "stray"),
    ],
)
def test_a_malformed_flag_is_a_startup_error_of_one_line(argv: list[str], named: str) -> None:
    with pytest.raises(StartupError, match=named) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)


def test_help_names_flag_variable_default_and_purpose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "Address to listen on. [LORAPLEX_THING_LISTEN] (default: 127.0.0.1:1)" in shown
    assert "--max-queued" in shown and "--no-warm" in shown


@pytest.mark.parametrize("service", ["router", "cache", "engine"])
def test_settings_of_a_service_can_be_listed_and_shown(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = importlib.import_module(f"{service}.config").Settings
    assert all(field.metadata["description"].strip() for field in fields(cls))
    with pytest.raises(SystemExit):
        read_settings(cls, service, ["--help"], {})
    shown = capsys.readouterr().out
    assert all(variable(service, field.name) in shown for field in fields(cls))
