"""Extract docstrings from Python source files by parsing, without importing them.

Importing a large package runs its code, needs its optional dependencies and is slower than reading
it. This file uses the standard library alone and can run as a worker of its own, which is how
corpus.py uses several cores without forking a process that has torch loaded:

    python -I docstrings.py < list.txt      # list.txt: one "module<TAB>path" per line

It answers with one JSON line per input line: a list of records [module, name, kind, head, doc].
`head` reads like the definition ("def torch.nn.functional.relu(input, inplace=False)"), `doc` is
the cleaned docstring. Docstrings attached by call (`add_docstr(torch.abs, "...")`, numpy's
`add_newdoc`) and by assignment (`X.__doc__ = "..."`) are found too.
"""

import ast
import gc
import inspect
import json
import re
import sys
import warnings

FORMAT = 1  # raise when a change here changes the text: it is part of the corpus cache key
MIN_CHARS = 20
Record = tuple[str, str, str, str, str]

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.If, ast.Try, ast.With, ast.For, ast.While)
_ATTACH = {"add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_BLANKS = re.compile(r"\n{3,}")
_ONLY_PLACEHOLDER = re.compile(r"^[ \t]*\{\w+\}[ \t]*\n?", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def clean(text: str) -> str:
    """Uniform indentation, no control characters, no trailing blanks, no double blank lines."""
    text = _CONTROL.sub("", inspect.cleandoc(text.replace("\r\n", "\n").replace("\r", "\n")))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANKS.sub("\n\n", text).strip()


def _string(node: ast.expr) -> str | None:
    """The value of an expression made of string literals, `+` and `.format(...)`, else None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _string(node.left), _string(node.right)
        return None if left is None or right is None else left + right
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "format"
    ):
        text = _string(node.func.value)
        if text is None:
            return None
        # The values live in dictionaries of the module; a line that is only a placeholder goes.
        text = _PLACEHOLDER.sub(r"\1", _ONLY_PLACEHOLDER.sub("", text))
        return text.replace("{{", "{").replace("}}", "}")
    return None


def _attached(node: ast.stmt, module: str) -> list[tuple[str, str]]:
    """(full name, docstring) pairs that a statement attaches to objects defined elsewhere."""
    call = node.value
    target = None
    if isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Attribute) and target.attr == "__doc__":
            text = _string(call)
            return [] if text is None else [(f"{module}.{ast.unparse(target.value)}", text)]
    if not isinstance(call, ast.Call) or len(call.args) < 2:
        return []
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in _ATTACH:
        return []
    first = _string(call.args[0])
    if called == "add_newdoc":
        second = _string(call.args[1])
        if first is None or second is None or len(call.args) < 3:
            return []
        base = f"{first}.{second}"
        last = call.args[2]
        entries = last.elts if isinstance(last, ast.List) else [last]
        found = []
        for entry in entries:
            if isinstance(entry, ast.Tuple) and len(entry.elts) == 2:
                found.append((f"{base}.{_string(entry.elts[0])}", _string(entry.elts[1])))
            else:
                found.append((base, _string(entry)))
        return [(name, text) for name, text in found if text is not None]
    text = _string(call.args[1])
    if text is None:
        return []
    if isinstance(target, ast.Name):
        return [(f"{module}.{target.id}", text)]
    if called == "add_docstr_all" and first is not None:
        return [(f"torch.Tensor.{first}", text)]
    return [(ast.unparse(call.args[0]), text)]


def _head(node: ast.AST, name: str) -> str:
    """One line that reads like the definition, annotations left out."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    arguments = node.args
    for argument in (
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        *filter(None, (arguments.vararg, arguments.kwarg)),
    ):
        argument.annotation = None
    return f"def {name}({ast.unparse(arguments)})"


def extract_source(source: bytes | str, module: str) -> list[Record]:
    """All docstrings of one module's source as (module, full name, kind, head, docstring).

    kind is "module", "class" or "function". Records come in the order of the source; docstrings
    under MIN_CHARS characters are left out. SyntaxError and its kin pass through.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        tree = ast.parse(source)
    records: list[Record] = []

    def add(name: str, kind: str, head: str, text: str | None) -> None:
        doc = clean(text) if text else ""
        if len(doc) >= MIN_CHARS:
            records.append((module, name, kind, head, doc))

    def walk(body: list[ast.stmt], prefix: str, depth: int) -> None:
        for node in body:
            if isinstance(node, _DEFINITIONS):
                name = f"{prefix}.{node.name}"
                text = ast.get_docstring(node, clean=False)
                if text:
                    kind = "class" if isinstance(node, ast.ClassDef) else "function"
                    add(name, kind, _head(node, name), text)
                walk(node.body, name, depth + 1)
            elif isinstance(node, _BLOCKS):
                walk(node.body, prefix, depth)
                walk(node.orelse if hasattr(node, "orelse") else [], prefix, depth)
                for handler in getattr(node, "handlers", []):
                    walk(handler.body, prefix, depth)
            elif depth == 0 and isinstance(node, (ast.Expr, ast.Assign)):
                for name, text in _attached(node, module):
                    add(name, "function", f"def {name}", text)

    add(module, "module", f"module {module}", ast.get_docstring(tree, clean=False))
    walk(tree.body, module, 0)
    return records


def extract_file(path: str, module: str) -> list[Record]:
    """extract_source of a file; a file that can't be read or parsed gives no records."""
    try:
        with open(path, "rb") as file:
            return extract_source(file.read(), module)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def main() -> None:
    """Worker: "module<TAB>path" lines on stdin (read to the end first), JSON lines on stdout."""
    sys.setrecursionlimit(10_000)
    gc.disable()  # syntax trees hold no cycles, and walking millions of nodes for them costs a lot
    for line in sys.stdin.buffer.read().decode("utf-8", "surrogateescape").splitlines():
        module, path = line.split("\t", 1)
        json.dump(extract_file(path, module), sys.stdout)
        sys.stdout.write("\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
