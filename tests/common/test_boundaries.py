"""Which modules may import which: the layers of docs/architecture.md."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "projects"
METHODS = ("solq", "isda", "istr", "effseg")


def module_name(path: Path) -> str:
    parts = ("querymask", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """What a file imports, as modules.

    Args:
        at_import: only what is imported when the file is, not what a function imports.
    """

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.Lambda):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other(method: str) -> None:
    others = tuple(f"querymask.{other}" for other in METHODS if other != method)
    for path in (PACKAGE / method).rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(others)], path


def test_common_imports_no_method() -> None:
    methods = tuple(f"querymask.{method}" for method in METHODS)
    for path in (PACKAGE / "common").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(methods)], path


def test_operators_need_torch_alone() -> None:
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    for path in (PACKAGE / "common" / "ops").rglob("*.py"):
        for name in imports(path, at_import=True):
            own = name.startswith(("querymask.common.ops", "querymask._C", "querymask.common.flops"))
            assert own or name.partition(".")[0] in allowed, f"{path} imports {name}"


def test_the_extension_includes_torch_alone() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        for line in path.read_text().splitlines():
            if line.startswith("#include <") and "/" in line:
                header = line.removeprefix("#include <").partition("/")[0]
                assert header in ("ATen", "c10", "torch"), f"{path}: {line}"


def test_the_package_imports_no_tool() -> None:
    tools = {path.stem for folder in ("tools", "benchmarks", ".") for path in (ROOT / folder).glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        assert not tools & {name.partition(".")[0] for name in imports(path)}, path


def test_modules_change_nothing_but_themselves_at_import() -> None:
    """Environment variables are read, and other packages changed, by functions: projects/__init__.py says which."""

    def executed(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.Lambda):
                yield child
                yield from executed(child)

    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        foreign = {
            (alias.asname or alias.name).partition(".")[0]
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in executed(tree):
            if isinstance(node, ast.Attribute):
                text = ast.unparse(node)
                assert text not in ("os.environ", "os.getenv"), f"{path}:{node.lineno}: {text}"
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                root = ast.unparse(node.value).partition(".")[0]
                assert root not in foreign, f"{path}:{node.lineno}: {ast.unparse(node)} is changed"


def test_no_script_imports_another() -> None:
    """What two scripts need is in the package, or in a package of the benchmarks."""
    scripts = [path for folder in ("tools", "benchmarks", ".") for path in (ROOT / folder).glob("*.py")]
    for path in scripts:
        assert not {script.stem for script in scripts} & {name.partition(".")[0] for name in imports(path)}, path


def test_no_circle() -> None:
    """Modules that import each other can only be imported in one order."""
    graph = {name: {n for n in imports(path, at_import=True) if n in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()
    open_: list[str] = []

    def visit(name: str) -> None:
        assert name not in open_, f"{' -> '.join(open_[open_.index(name) :])} -> {name}"
        if name in done:
            return
        open_.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(open_.pop())

    for name in graph:
        if name != "querymask":  # imports its parts, which may ask it for its version
            visit(name)
