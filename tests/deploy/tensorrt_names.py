"""Every TensorRT name that a source file uses, looked up in the loaded bindings; run as a script beside them.

`python tensorrt_names.py FILE...` prints JSON: ``version``, ``checked`` (names such as ``Builder.create_network``) and ``problems``.

Types are followed through the code: ``trt`` is the module, ``x = trt.Builder(...)`` an instance, a parameter annotated ``trt.X`` too,
and what a method returns stands in its pybind11 docstring. What a docstring cannot say stands in ``DECLARED``.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorrt as trt

DECLARED = {
    "OnnxParser.get_error": "ParserError",
    "get_plugin_registry": "IPluginRegistry",
    "make_logger": "ILogger",
}
"""Class of what a call returns where the docstring does not name it."""

PLAIN = {"None", "bool", "int", "str", "float", "object"}
"""Return types that carry no TensorRT names."""


@dataclass(frozen=True)
class Value:
    """What is known of an expression: the module, a class, an instance of a class, or something callable."""

    kind: str
    item: Any
    name: str = ""


@dataclass
class Names(ast.NodeVisitor):
    checked: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    scope: dict[str, Value] = field(default_factory=dict)
    known: dict[int, Value | None] = field(default_factory=dict)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.scope = self.scope, dict(self.scope)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            if argument.arg == "trt":
                self.scope["trt"] = Value("module", trt)
            elif argument.annotation is not None:
                value = self.resolve(argument.annotation)
                if value is not None and value.kind == "class":
                    self.scope[argument.arg] = Value("instance", value.item, value.name)
        self.generic_visit(node)
        # Attributes of self outlive the method that set them.
        outer |= {name: value for name, value in self.scope.items() if name.startswith("self.")}
        self.scope = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            value = self.resolve(base)
            if value is not None and value.kind == "class":
                self._check_overrides(node, value)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        value = self.resolve(node.value)
        for target in node.targets:
            name = ast.unparse(target)
            if isinstance(target, ast.Name) and name == "trt":
                self.scope[name] = Value("module", trt)
            elif value is not None and isinstance(target, ast.Name | ast.Attribute):
                self.scope[name] = value
            else:
                self.scope.pop(name, None)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.resolve(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.resolve(node)

    def resolve(self, node: ast.AST) -> Value | None:
        """None for everything that is not TensorRT's."""
        if id(node) not in self.known:
            self.known[id(node)] = self._resolve(node)
        return self.known[id(node)]

    def _resolve(self, node: ast.AST) -> Value | None:
        if isinstance(node, ast.Name):
            return Value("module", trt) if node.id == "trt" else self.scope.get(node.id)
        if isinstance(node, ast.Attribute):
            if (name := ast.unparse(node)) in self.scope:
                return self.scope[name]
            return self._attribute(node, self.resolve(node.value))
        if isinstance(node, ast.Call):
            return self._call(node)
        return None

    def _attribute(self, node: ast.Attribute, base: Value | None) -> Value | None:
        if base is None or base.kind == "plain":
            return None
        name = f"{base.name}.{node.attr}" if base.name else node.attr
        if base.kind == "callable":
            self.problems.append(f"line {node.lineno}: {base.name} is not called before .{node.attr}")
            return None
        if base.kind == "unknown":
            self.problems.append(
                f"line {node.lineno}: what {base.name} returns is not declared, so .{node.attr} is unchecked"
            )
            return None
        if not hasattr(base.item, node.attr):
            # The subclass of our own logger adds `errors`.
            if base.item is getattr(trt, "ILogger", None) and node.attr == "errors":
                return None
            self.problems.append(f"line {node.lineno}: {name} does not exist in TensorRT {trt.__version__}")
            return None
        self.checked.add(name)
        item = getattr(base.item, node.attr)
        if inspect.isclass(item):
            return Value("class", item, node.attr)
        if isinstance(item, property):
            return Value("plain", None)
        if callable(item):
            return Value("callable", item, name)
        return Value("plain", None)

    def _call(self, node: ast.Call) -> Value | None:
        function = self.resolve(node.func)
        own = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function is None:
            declared = DECLARED.get(own)
            return Value("instance", getattr(trt, declared), declared) if declared else None
        if function.kind == "class":
            if not hasattr(function.item, "__members__"):
                self._check_arguments(node, function.item.__init__, function.name)
            return Value("instance", function.item, function.name)
        if function.kind != "callable":
            return None
        returned = self._check_arguments(node, function.item, function.name)
        declared = DECLARED.get(function.name)
        if declared:
            return Value("instance", getattr(trt, declared), declared)
        if returned is None or returned in PLAIN or returned.startswith("list"):
            return Value("plain", None)
        kind = getattr(trt, returned.rsplit(".", 1)[-1], None)
        if kind is None:
            return Value("unknown", None, function.name)
        return Value("instance", kind, returned.rsplit(".", 1)[-1])

    def _check_arguments(self, node: ast.Call, function: Any, name: str) -> str | None:
        """The type that the matching overload returns; a problem when none of them takes these arguments."""
        overloads = signatures(function)
        for parameters, returned in overloads:
            if accepts(parameters, node):
                return returned
        if overloads:
            given = ", ".join([*["_"] * len(node.args), *[f"{k.arg}=" for k in node.keywords]])
            self.problems.append(f"line {node.lineno}: no form of {name} takes ({given}) in TensorRT {trt.__version__}")
        return None

    def _check_overrides(self, node: ast.ClassDef, base: Value) -> None:
        for method in (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name != "__init__"):
            name = f"{base.name}.{method.name}"
            if not hasattr(base.item, method.name):
                self.problems.append(f"line {method.lineno}: {name} does not exist in TensorRT {trt.__version__}")
                continue
            self.checked.add(name)
            wanted = len(signatures(getattr(base.item, method.name))[0][0])
            found = len(method.args.args) - 1
            if wanted != found:
                self.problems.append(
                    f"line {method.lineno}: {name} is called with {wanted} arguments, ours takes {found}"
                )


def signatures(function: Any) -> list[tuple[list[tuple[str, bool]], str]]:
    """(parameters without self as (name, required), return type) of every overload, from a pybind11 docstring."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.match(r"^(?:\d+\. )?\w+\((.*)\) -> (.*)$", line.strip())
        if match is None or match[1].startswith("*args"):
            continue
        parameters = []
        for text in split_top_level(match[1]):
            name, _, rest = text.partition(":")
            if name.strip() != "self":
                parameters.append((name.strip(), "=" not in rest))
        found.append((parameters, match[2].strip()))
    return found


def split_top_level(text: str) -> list[str]:
    """Parts between commas that are outside brackets; default values such as <Severity.WARNING: 2> are brackets too."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def accepts(parameters: list[tuple[str, bool]], node: ast.Call) -> bool:
    names = [name for name, _ in parameters]
    given = [*names[: len(node.args)], *[keyword.arg for keyword in node.keywords]]
    return (
        len(node.args) <= len(names)
        and all(name in names for name in given)
        and len(set(given)) == len(given)
        and all(name in given for name, required in parameters if required)
    )


def main() -> None:
    checked: set[str] = set()
    problems: list[str] = []
    for path in sys.argv[1:]:
        names = Names()
        names.visit(ast.parse(Path(path).read_text()))
        checked |= names.checked
        problems += [f"{Path(path).name}, {problem}" for problem in names.problems]
    print(json.dumps({"version": trt.__version__, "checked": sorted(checked), "problems": problems}))


if __name__ == "__main__":
    main()
