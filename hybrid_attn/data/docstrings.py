"""Documentation strings of Python files: text that every machine has, for examples without a download."""

import ast
import warnings
from pathlib import Path

WITH_DOCSTRINGS = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def docstrings_of(path: Path) -> list[tuple[str, str]]:
    """The name and the documentation string of the module, the classes and the functions of a file; none if it does not parse.

    The name of a module is that of its file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of strings with unknown escapes
            nodes = ast.walk(ast.parse(path.read_bytes()))
    except (SyntaxError, ValueError):  # a test of such errors, or another version's syntax
        return []
    documented = [node for node in nodes if isinstance(node, WITH_DOCSTRINGS)]
    return [(getattr(node, "name", path.stem), text) for node in documented if (text := ast.get_docstring(node))]
