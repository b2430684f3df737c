"""The layering: a file of lorafx imports only files of strictly lower levels, and `import lorafx` stays light."""

import ast
from pathlib import Path
import subprocess
import sys

import lorafx

LEVELS = {
    "_errors": 0, "_products": 0, "_header": 0, "_scratch": 0,
    "_kernels": 1, "_adapter": 1, "_rules": 1, "_graph": 1, "_durable": 1, "_watch": 1, "_pickled": 1, "_generators": 1,
    "_trace": 2, "_source": 2, "_sites": 2, "_weight": 2, "_files": 2, "_training": 2,
    "_scan": 3, "_branch": 3, "_native": 3, "_minimind": 3, "_stored": 3, "_peft_config": 3, "_checkpoint": 3,
    "_record": 4, "_group": 4, "_kohya": 4, "_peft_read": 4, "_archive": 4, "_jobs": 4,
    "_region": 5, "_peft_write": 5, "_inductor": 5, "_output": 5,
    "_program": 6, "_formats": 6, "_guard": 6, "_compile": 6,
    "_merge": 7, "_fit": 7,
    "_attach": 8, "_report": 8, "_locate": 8, "_compare": 8,
    "_switch": 9, "_shards": 9,
    "_resume": 10, "_stream": 10,
    "_inject": 11,
    "__init__": 12,
    "_arguments": 13,
    "__main__": 14,
}
FOLDER = Path(lorafx.__file__).parent


def imported(path: Path) -> set[str]:
    """The files of lorafx that a file names in its import statements."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = {alias.name for alias in node.names}
            found |= {node.module} if node.module else {name if name in LEVELS else "__init__" for name in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "lorafx" for name in names), f"{path}: import relatively"
    return found


def test_every_file_has_a_level_and_imports_only_lower_ones():
    files = {path.stem: path for path in FOLDER.glob("*.py")}
    assert files.keys() == LEVELS.keys()
    for name, path in files.items():
        for other in imported(path):
            assert LEVELS[other] < LEVELS[name], f"{name} (level {LEVELS[name]}) imports {other} ({LEVELS[other]})"


def test_an_import_brings_in_no_heavy_package():
    code = "import sys, lorafx; print([n for n in ('transformers', 'peft', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_public_surface():
    assert sorted(name for name in vars(lorafx) if not name.startswith("_")) == [
        "AdaptedWeightError", "AdapterError", "ConfigError", "FormatError", "InjectLoRA", "LorafxError", "MergeLoRA",
        "MismatchError", "NoSiteError", "NotInjectedError", "TiedWeightError", "UnsupportedModelError", "activate",
        "adapters", "add", "compile_options", "compose", "disabled", "eject", "inject", "load", "merge",
        "named_parameters", "parameters", "remove", "resume", "save", "sites", "summary"]


def test_every_public_name_has_an_example():
    for name, value in vars(lorafx).items():
        if not name.startswith("_") and not (isinstance(value, type) and issubclass(value, Exception)):
            assert ">>>" in (value.__doc__ or ""), name


def test_functions_fit_a_screen():
    for path in (*FOLDER.glob("*.py"), *FOLDER.parent.glob("benchmarks/*.py"), *FOLDER.parent.glob("tests/*.py")):
        text = path.read_text()
        assert text.count("\n") <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 61, f"{path}: {node.name}"
