"""Ratchets: what keeps the code in the shape that CONTRIBUTING.md describes."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from qtune.recipe import FormatName, MethodName
from qtune.recipe_data import RowFormat
from qtune.recipe_train import ObjectiveName
from qtune.recipe_yaml import json_schema

ROOT = Path(__file__).parent.parent
PACKAGES = {ROOT / "qtune": ROOT / "tests", ROOT / "kernels/qtune_kernels": ROOT / "tests/kernels"}
MAX_LINES = 400


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(node: ast.AST, name: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions, classes and methods whose whole name is public."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        yield f"{name}{child.name}", child
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child, f"{name}{child.name}.")


def undocumented(source: str) -> list[str]:
    module = ast.parse(source)
    missing = [] if ast.get_docstring(module) or not module.body else ["the module"]
    for name, node in public_definitions(module):
        if not ast.get_docstring(node):
            missing.append(name)
    return missing


def test_undocumented_finds_what_lacks_a_docstring() -> None:
    documented = '"""Module."""\nclass A:\n    """Doc."""\n'
    source = documented + "    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n"
    assert undocumented(source) == ["A.f", "h"]
    assert undocumented("x = 1") == ["the module"]
    assert undocumented("") == []


def test_no_file_is_too_long() -> None:
    lengths = {
        relative(path): len(path.read_text("utf-8").splitlines())
        for path in python_files("qtune", "kernels", "scripts")
    }
    assert lengths, "no source files were found"
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_public_names_have_docstrings() -> None:
    found = {
        relative(path): undocumented(path.read_text("utf-8"))
        for path in python_files("qtune", "kernels/qtune_kernels")
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_modules_have_their_mirrored_test() -> None:
    missing = []
    for package, tests in PACKAGES.items():
        for path in sorted(package.rglob("*.py")):
            mirror = tests / path.relative_to(package).parent / f"test_{path.name}"
            if path.stem not in ("__init__", "__main__") and not mirror.exists():
                missing.append(f"{relative(path)} -> {relative(mirror)}")
    assert missing == []


def test_source_folders_are_packages() -> None:
    # import-linter and the layers contract see regular packages only
    folders = {path.parent for path in python_files("qtune", "kernels/qtune_kernels")}
    assert [relative(path) for path in sorted(folders) if not (path / "__init__.py").exists()] == []


def test_kernels_folder_is_no_package() -> None:
    # it would shadow the package `kernels` that transformers imports
    assert not (ROOT / "kernels/__init__.py").exists()


def test_tests_folders_are_no_packages() -> None:
    assert [relative(path) for path in (ROOT / "tests").rglob("__init__.py")] == []


def test_schema_of_the_recipes_is_current() -> None:
    written = json.loads((ROOT / "recipes/recipe.schema.json").read_text("utf-8"))
    assert written == json_schema(), "run: qtune schema > recipes/recipe.schema.json"


def test_recipes_point_editors_to_the_schema() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes, "no recipes were found"
    first = {path.name: path.read_text("utf-8").splitlines()[0] for path in recipes}
    assert set(first.values()) == {"# yaml-language-server: $schema=recipe.schema.json"}, first


@pytest.mark.parametrize(
    ("names", "folder", "helpers"),
    [
        (get_args(FormatName), "qtune/quant/formats", set()),
        (get_args(MethodName), "qtune/quant/methods", {"ldlq"}),
        (get_args(ObjectiveName), "qtune/train/objectives", set()),
        (set(get_args(RowFormat)) - {"auto"}, "qtune/data/formats", set()),
    ],
    ids=["formats", "methods", "objectives", "row formats"],
)
def test_names_in_the_recipe_are_the_files(
    names: tuple[str, ...], folder: str, helpers: set[str]
) -> None:
    assert set(names) == stems(ROOT / folder) - helpers


@pytest.mark.parametrize("module", ["qtune.cli", "qtune.recipe", "qtune.recipe_yaml"])
def test_import_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from qtune.cli import main\n"
        "sys.argv = ['qtune', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "doctor" in done.stdout
