from __future__ import annotations

import sys
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from trainer.plugins import load_target


@pytest.fixture(autouse=True)
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


def test_finds_module_in_working_directory(in_project: Path) -> None:
    (in_project / "plug_own.py").write_text("class Outer:\n    value = 41\ndef make(): return 42\n")
    assert load_target("model.target", "plug_own:make")() == 42  # type: ignore[operator]
    assert load_target("model.target", "plug_own:Outer.value") == 41


def test_missing_module_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.target=no_such_pkg\.sub:f: there is no module 'no_such_pkg'"
    ):
        load_target("model.target", "no_such_pkg.sub:f")


def test_missing_attribute_suggests_the_closest(in_project: Path) -> None:
    (in_project / "plug_typo.py").write_text("def build_model(): ...\n")
    with pytest.raises(
        ConfigError, match=r"no attribute 'biuld_model'.*Fix: layout\.target=plug_typo:build_model\."
    ):
        load_target("layout.target", "plug_typo:biuld_model")


@pytest.mark.parametrize("target", ["module_only", ":f", "module:"])
def test_wrong_form(target: str) -> None:
    with pytest.raises(ConfigError, match=r"package\.module:attribute"):
        load_target("data.target", target)


@pytest.mark.parametrize(
    ("module", "content", "said"),
    [
        (
            "plug_needy",
            "import absent_dependency\n",
            r"ModuleNotFoundError.*absent_dependency.*plug_needy\.py:1",
        ),
        (
            "plug_raising",
            "x = 1\nraise RuntimeError('boom')\n",
            r"RuntimeError: boom \(.*plug_raising\.py:2\)",
        ),
        ("plug_syntax", "def f(:\n", r"SyntaxError.*plug_syntax\.py:1"),
    ],
)
def test_failing_import_says_where(in_project: Path, module: str, content: str, said: str) -> None:
    (in_project / f"{module}.py").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_target("data.target", f"{module}:f")
