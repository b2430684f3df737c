"""Packages import only lower floors, `import lorafx` is light, and a file fits a screen or two."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorafx

# Packages, and the files beside them, on their floors: each imports only lower ones, and itself.
FLOORS = (
    {"_errors", "_version", "_kernels"},
    {"_adapter"},
    {"_graph", "_storage"},
    {"_model", "_checkpoint"},
    {"_formats", "_switch", "_compose", "_rename", "_merge", "_summary", "_compile"},
    {"_inject", "_resume", "_save", "_export", "_pictures", "_cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
FOLDER = Path(lorafx.__file__).parent


def room_of(path: Path) -> str:
    """The package that a file is in, or the file by itself."""
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file of lorafx names in its import statements."""
    depth = len(path.relative_to(FOLDER).parts)  # dots that lead to lorafx itself
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (name.partition(".")[0] for name in names)
        elif isinstance(node, ast.ImportFrom):
            assert (
                node.level or node.module.partition(".")[0] != "lorafx"
            ), f"{path}: import relatively"
            assert node.level <= depth, path
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] != "lorafx", f"{path}: import relatively"


def test_every_room_imports_only_lower_floors():
    rooms = {room_of(path) for path in FOLDER.rglob("*.py")}
    assert rooms == FLOOR.keys() | {"__init__"}
    for path in FOLDER.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        for other in imported(path):
            here = f"{path.relative_to(FOLDER)} (floor {FLOOR[room]})"
            assert FLOOR[other] < FLOOR[room], f"{here} imports {other}"


def test_no_package_imports_in_a_circle():
    for package in sorted(path for path in FOLDER.iterdir() if (path / "__init__.py").is_file()):
        imports: dict[str, set[str]] = {}
        for path in package.glob("*.py"):
            names = imports.setdefault(path.stem, set())
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    names |= {node.module} if node.module else {alias.name for alias in node.names}
        while imports:
            ground = {name for name, others in imports.items() if not others & imports.keys()}
            assert ground, f"{package.name}: {', '.join(sorted(imports))} import each other"
            for name in ground:
                del imports[name]


def test_a_wing_knows_nothing_of_the_other():
    """Graphs and models know no files; bytes and checkpoints know no live model."""
    left, right = {"_graph", "_model"}, {"_storage", "_checkpoint"}
    for path in FOLDER.rglob("*.py"):
        here = room_of(path)
        for mine, others in ((left, right), (right, left)):
            assert here not in mine or others.isdisjoint(imported(path)), path


def ran(code: str) -> str:
    """What a new process prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_an_import_brings_in_no_heavy_package():
    heavy = "('transformers', 'peft', 'matplotlib')"
    code = (
        f"import sys, lorafx; lorafx.save; print([name for name in {heavy} if name in sys.modules])"
    )
    assert ran(code) == "[]\n"


PUBLIC = [
    "AdaptedWeightError", "AdapterError", "ConfigError", "FormatError", "InjectLoRA", "LorafxError",
    "MergeLoRA", "MismatchError", "NoSiteError", "NotInjectedError", "Site", "Summary", "Targets",
    "TiedWeightError", "UnsupportedModelError", "activate", "adapters", "add", "compile_options",
    "compose", "disabled", "draw", "eject", "export", "inject", "load", "merge", "merge_error",
    "named_parameters", "parameters", "remove", "rename", "reset_parameters", "resume", "rows",
    "save", "sites", "summary", "using"]


def test_the_public_surface():
    assert [name for name in dir(lorafx) if not name.startswith("_")] == PUBLIC == lorafx.__all__


def test_names_are_imported_when_they_are_used():
    assert (
        ran("import sys, lorafx; print('torch' in sys.modules, dir(lorafx)[-1])")
        == "False using\n"
    )
    assert ran("from lorafx import *; print(inject.__name__, Site.__name__)") == "inject Site\n"
    with pytest.raises(AttributeError, match="module 'lorafx' has no attribute 'injct'"):
        lorafx.injct


def test_checkers_of_types_see_the_names_that_are_imported():
    """The imports of lorafx/__init__.py that only they run are those that its table says."""
    static = {}
    for node in ast.walk(ast.parse(Path(lorafx.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module != "_version":
            [alias] = node.names
            assert alias.name == alias.asname
            static[alias.name] = node.module
    assert static == lorafx._MODULE_OF


def test_many_threads_import_the_names_at_once():
    code = """if True:
        import lorafx, threading
        found, start = [], threading.Barrier(len(lorafx.__all__))
        def use(name):
            start.wait()
            found.append(getattr(lorafx, name))
        threads = [threading.Thread(target=use, args=(name,)) for name in lorafx.__all__]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(len(found) == len(lorafx.__all__))"""
    assert ran(code) == "True\n"


def test_every_public_name_has_an_example():
    for name in set(PUBLIC) - {"Targets"}:
        value = getattr(lorafx, name)
        if not (isinstance(value, type) and issubclass(value, Exception)):
            assert ">>>" in (value.__doc__ or ""), name


def test_functions_fit_a_screen():
    root = FOLDER.parent
    paths = [*FOLDER.rglob("*.py"), *root.glob("benchmarks/**/*.py"), *root.glob("tests/**/*.py")]
    for path in paths:
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 61, f"{path}: {node.name}"
