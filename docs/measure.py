"""Measures of the source in av_mae/ and configs/: files, lines, statements, the longest of them, and imports.

    python docs/measure.py

A statement is an `ast.stmt`, docstrings included: unlike lines, statements do not change with the formatter.
`imports` follows import statements at module level and inside functions alike.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def sources(root: pathlib.Path = ROOT) -> dict[str, ast.Module]:
    """Path relative to `root` → the parsed file, for all Python files in av_mae/ and configs/."""
    files = sorted([*(root / "av_mae").rglob("*.py"), *(root / "configs").rglob("*.py")])
    return {str(file.relative_to(root)): ast.parse(file.read_text()) for file in files}


def statements(tree: ast.Module) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def functions(tree: ast.Module) -> dict[str, int]:
    """Name → lines of every function and method."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, kinds)}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(trees: dict[str, ast.Module], lazy: bool = True) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports; `lazy`: also those imported inside functions."""
    modules = {module_name(path) for path in trees}
    found = {}
    for path, tree in trees.items():
        nodes = ast.walk(tree) if lazy else tree.body
        wanted = set()
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            elif isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
        full = wanted & modules
        # `from package import module` needs the module; the package's own file counts if nothing else of it is named
        found[module_name(path)] = {name for name in full if not any(other.startswith(name + ".") for other in full)}
        found[module_name(path)].discard(module_name(path))
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (strongly connected components of more than one module)."""
    order, low, stack, groups = {}, {}, [], []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in sorted(graph):
        if name not in order:
            visit(name)
    return groups


def rooms(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between folders and top files of the package (`av_mae.train`, `av_mae.config`, ...).

    A command (`av_mae.train.__main__`) is a room of its own: commands stand above all libraries.
    """

    def room(name: str) -> str:
        return name if name.endswith(".__main__") else ".".join(name.split(".")[:2])

    joined: dict[str, set[str]] = {room(name): set() for name in graph}
    for name, others in graph.items():
        joined[room(name)] |= {room(other) for other in others} - {room(name)}
    return joined


def main() -> None:
    trees = sources()
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in trees}
    longest = max(
        ((name, size, path) for path, tree in trees.items() for name, size in functions(tree).items()),
        key=lambda entry: entry[1],
    )
    graph = imports(trees)
    print(f"files                {len(trees)}")
    print(f"lines                {sum(lines.values())}, {sum(lines.values()) / len(trees):.0f} per file")
    print(f"statements           {sum(map(statements, trees.values()))}")
    print(f"longest file         {max(lines.values())} lines ({max(lines, key=lines.get)})")
    print(f"longest function     {longest[1]} lines ({longest[2]}: {longest[0]})")
    print(f"circles of modules   {circles(graph) or 'none'}")
    print(f"circles of rooms     {circles(rooms(graph)) or 'none'}")


if __name__ == "__main__":
    main()
