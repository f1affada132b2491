"""The house: every file imports only from strictly lower levels, no cycles, and light commands stay
light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import dray
from dray.spec import find_task, task_names

SOURCE = Path(__file__).parents[2] / "src" / "dray"

LEVELS = {
    "errors": 0,
    "redaction": 1,
    "order": 1,
    "processes": 2,
    "storage": 2,
    "spec": 3,
    "plan": 4,
    "models": 5,
    "runs": 5,
    "cluster": 5,
    "origin": 6,
    "tasks": 6,
    "doctor": 6,
    "jobs": 6,
    "feedback": 6,
    "corpus": 7,
    "rank": 8,
    "ledger": 8,
    "privacy": 8,
    "show": 9,
    "train": 10,
    "release": 10,
    "sweep": 11,
    "serve": 11,
    "ladder": 12,
    "pipeline": 12,
    "cli": 13,
}
"""The table of docs/design.md. A room may be a file or a folder."""


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[0] not in ("__init__", "recipes", "tune_spaces"):
            found.setdefault(parts[0], []).append(path)
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """A file of the program, for many tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


def names_imported_by(node: ast.AST) -> set[str]:
    """Dotted names, if the node is an import: of modules, or of what is in them."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imported_modules(path: Path) -> set[str]:
    """Dotted names below dray that a file imports, anywhere in it, except for annotations alone."""
    names: set[str] = set()
    tree = parsed(path)
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        assert not getattr(node, "level", 0), f"{path}: relative import"
        names |= names_imported_by(node)
    return {
        name.removeprefix("dray.")
        for name in names
        if name.startswith("dray.") and "__" not in name
    }


def test_every_room_has_a_level():
    assert set(rooms()) == set(LEVELS)


@pytest.mark.parametrize("room", sorted(LEVELS))
def test_imports_go_strictly_down(room: str):
    for path in rooms()[room]:
        for name in imported_modules(path):
            other = name.partition(".")[0]
            if other != room:
                assert LEVELS[other] < LEVELS[room], f"{path} imports {name}"


def test_no_module_imports_itself_in_a_circle():
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph = {}
    for name, path in modules.items():
        targets = set()
        for imported in imported_modules(path):
            # `from dray.a import b` is module a.b if there is one, else module a.
            package = imported.rpartition(".")[0]
            found = {package} if imported not in modules else {imported}
            if imported in modules and name.startswith(f"{package}."):
                # `from package import submodule` asks the package, which imports this file.
                found.add(package)
            targets |= {target for target in found if target in modules and target != name}
        graph[name] = targets
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import circle: {' → '.join((*above, name))}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


FOREIGN = {
    "deepspeed": ("rank/engine.py",),
    "ray.train": ("cluster/workers.py", "cluster/groups.py", "train/"),
    "ray.data": ("corpus/", "train/worker.py"),
    "ray.tune": ("sweep/policies.py",),
    "peft": ("models/adapters.py",),
    "onnx": ("release/export/onnx.py",),
    "onnxruntime": ("release/export/onnx.py",),
    "gguf": ("release/export/gguf.py",),
    "optuna": ("sweep/search.py", "sweep/importance.py"),
    "matplotlib": ("show/plots.py",),
    "ray.serve": ("serve/service.py",),
    "fastwarc": ("corpus/warc.py",),
    "resiliparse": ("corpus/pages.py",),
    "trafilatura": ("corpus/pages.py",),
    "phonenumbers": ("corpus/phones.py",),
    "spacy": ("corpus/person_names.py",),
    "prometheus_client": ("serve/metering.py",),
}


@pytest.mark.parametrize("library", sorted(FOREIGN))
def test_each_foreign_system_is_spoken_to_in_one_place(library: str):
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(parsed(path)):
            names = names_imported_by(node)
            if any(name == library or name.startswith(library + ".") for name in names):
                assert place.startswith(FOREIGN[library]), f"{path} imports {library}"


OTHER_MEANINGS = {
    ("redaction.py", "policy"),
    ("models/config.py", "embedding"),
    ("models/groups.py", "embedding"),
    ("serve/api.py", "embedding"),
    ("serve/schemas.py", "embedding"),
    ("release/checks.py", "reward"),
}
"""Words that a file has which happen to be a task's: of a signed URI, of dropout, of a weight's
name, of OpenAI's answers, and of what a program gives for an answer."""


def test_nothing_outside_of_tasks_asks_for_a_task():
    """A task is one file: neither its name nor its module is anywhere but in its own room."""
    modules = {find_task(name).__module__ for name in task_names()}
    assert len(modules) == len(task_names())
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        if place.startswith("tasks/"):
            continue
        asked = {
            name
            for name in imported_modules(path)
            if any(f"dray.{name}.".startswith(f"{module}.") for module in modules)
        }
        named = {
            node.value
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Constant)
            and node.value in task_names()
            and (place, node.value) not in OTHER_MEANINGS
        }
        assert not asked | named, f"{path} asks for {asked | named}"


NAMED_IN_STRINGS = {"__init__.py", "processes/forkserver.py", "spec/spec.py"}
"""Files that may name a module of dray in a string: what is imported on first use, what a process
is told to import, and the folder of the recipes."""


def test_a_module_that_is_named_in_a_string_is_there():
    """Such a name breaks in silence when its file moves. Loggers' names are rooms."""
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(parsed(path)):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            if re.fullmatch(r"dray(/\w+)+(/|\.py)", node.value):  # as stacks show it
                assert (SOURCE.parent / node.value).exists(), f"{path} names {node.value}"
            if not re.fullmatch(r"dray(\.[a-z_]+)+", node.value):
                continue
            folder = SOURCE.joinpath(*node.value.split(".")[1:])
            assert folder.is_dir() or folder.with_suffix(".py").is_file(), (
                f"{path} names {node.value}"
            )
            is_room = folder.parent == SOURCE and folder.is_dir()
            assert is_room or place in NAMED_IN_STRINGS, f"{path} names {node.value}"


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their file names alone, and collects neither of two alike."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_public_name_is_there():
    for name in dray.__all__:
        assert getattr(dray, name) is not None


def test_every_error_of_dray_is_in_one_file():
    names = {"DrayError"}
    for node in ast.parse((SOURCE / "errors.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & names, f"{path}: {node.name} belongs into errors.py"


def test_nothing_that_unpickles_is_called():
    """Nothing from storage is unpickled. corpus/stages.py carries its own tasks' items and answers
    through Ray."""
    for paths in rooms().values():
        for path in paths:
            text = path.read_text(encoding="utf-8")
            words = ["pickle.load(", "torch.load(", "yaml.load(", "trust_remote_code=True"]
            if path.relative_to(SOURCE).as_posix() != "corpus/stages.py":
                words.append("pickle.loads(")
            for word in words:
                assert word not in text, f"{path} contains {word}"


def test_the_reference_pages_follow_the_program():
    script = SOURCE.parents[1] / "docs" / "generate.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_schema_for_editors_takes_the_recipes_and_knows_the_bounds():
    import jsonschema

    file = SOURCE.parents[1] / "docs" / "spec.schema.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    recipes = {
        path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (SOURCE / "recipes").glob("*.yaml")
    }
    for name, recipe in recipes.items():
        assert not [error.message for error in validator.iter_errors(recipe)], name
        for workers, is_valid in ((2, True), ([1, 3], True), (0, False), (-5, False)):
            given = {**recipe, "resources": {"workers": workers}}
            assert validator.is_valid(given) == is_valid, workers


def test_the_readme_is_short_and_its_tree_is_true():
    root = SOURCE.parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    tree = text.partition("## The tree")[2]
    for room in rooms():
        assert f"{room}.py" in tree or f"{room}/" in tree, f"{room} is missing in README's tree"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "quickstart"], ["plan", "quickstart", "--shape", "2x8xH100"]]
)
def test_help_and_plan_import_neither_torch_nor_ray(arguments: list[str], tmp_path: Path):
    (tmp_path / "runs" / "corpora").mkdir(parents=True)  # as after a first run
    code = (
        "import sys; from dray.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'deepspeed', 'numpy'} & "
        "set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_release_needs_the_packages_of_a_service_only_to_serve():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('fastapi', 'starlette', 'uvicorn', 'limits'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import dray.pipeline.release, dray.serve.foreground, dray.serve.held_keys\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
