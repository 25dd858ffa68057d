"""Flags, variables and defaults of `loraplex up`, and the commands they become."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.layout import Layout
from launcher.options import Options, default_data_dir, parse_options
from launcher.plan import Machine, plan_services, public_address


def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path, -1, tmp_path / "run", False, tmp_path / "host")


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default(tmp_path: Path) -> None:
    environ = {
        "LORAPLEX_DATA_DIR": "/d",
        "LORAPLEX_ENGINE_MODEL": "a/b",
        "LORAPLEX_CACHE_REDIS": "redis://r",
        "LORAPLEX_CACHE_ADAPTER_ROOTS": "/x:/y",
    }
    by_variable = parse_options([], environ)
    assert by_variable == Options(
        host="127.0.0.1", port=50051, model="a/b", adapter_roots=("/x", "/y"), redis="redis://r", engines=1,
        data_dir=Path("/d"), device="auto", dtype="auto", demo_adapters=True,
    )  # fmt: skip
    by_flag = parse_options(
        ["--data-dir", "/e", "--model", "c", "--adapter-root", "/z", "--redis", "unix:///s", "--port", "0"], environ
    )
    assert (str(by_flag.data_dir), by_flag.model, by_flag.adapter_roots) == ("/e", "c", ("/z",))
    assert (by_flag.redis, by_flag.port) == ("unix:///s", 0)
    assert default_data_dir({"XDG_DATA_HOME": "/h"}) == "/h/loraplex"
    assert default_data_dir({}) == "~/.local/share/loraplex"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--port", "x"], "--port: 'x' is not a whole number"),
        (["--port", "70000"], "70000 is not between 0 and 65535"),
        (["--engines", "0"], "0 is not between 1 and 64"),
        (["--redis", "localhost:6379"], "none of redis://"),
        (["--dtype", "int3"], "int3"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_a_bad_flag_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    with pytest.raises(SystemExit) as exited:
        parse_options(arguments, {})
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert named in err and err.count("\n") == 1


def test_one_of_each_and_the_router_stops_first(tmp_path: Path) -> None:
    options = parse_options(["--adapter-root", "/a", "--adapter-root", "/b"], {})
    services = plan_services(options, layout(tmp_path), Machine(8), "/model", Path("/valkey"))
    assert [service.name for service in services] == ["store", "cache", "engine-0", "router"]
    assert [s.name for s in sorted(services, key=lambda s: s.stage)] == ["router", "engine-0", "cache", "store"]
    cache, engine, router = (" ".join(service.command) for service in services[1:])
    assert f"--redis unix://{tmp_path}/run/store.sock" in cache
    assert "--adapter-roots /a --adapter-roots /b" in cache
    assert f"--cache unix:{tmp_path}/run/cache.sock" in engine and "--model /model" in engine
    assert "--threads" not in engine
    assert f"--engines unix:{tmp_path}/run/engine-0.sock" in router and "--listen 127.0.0.1:50051" in router


def test_a_named_store_is_used(tmp_path: Path) -> None:
    options = parse_options(["--redis", "redis://elsewhere"], {})
    services = plan_services(options, layout(tmp_path), Machine(8), "/model", None)
    assert [service.name for service in services] == ["cache", "engine-0", "router"]
    assert all(not service.needs for service in services)
    assert "redis://elsewhere" in services[0].command


def test_engines_share_cores_or_accelerators(tmp_path: Path) -> None:
    options = parse_options(["--engines", "3"], {})
    on_cpu = plan_services(options, layout(tmp_path), Machine(8), "/m", None)[1:4]
    assert ["--threads 2" in " ".join(service.command) for service in on_cpu] == [True] * 3
    on_gpu = plan_services(options, layout(tmp_path), Machine(8, ("4", "5")), "/m", None)[1:4]
    assert [service.environ["CUDA_VISIBLE_DEVICES"] for service in on_gpu] == ["4", "5", "4"]
    router = plan_services(options, layout(tmp_path), Machine(8), "/m", None)[-1]
    assert router.command.count("--engines") == 3


def test_addresses_of_both_families() -> None:
    assert (public_address("127.0.0.1", 1), public_address("::1", 1)) == ("127.0.0.1:1", "[::1]:1")
