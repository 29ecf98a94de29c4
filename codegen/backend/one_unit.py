"""One translation unit: all C++ kernels of a compilation in one file.

Inductor writes each distinct kernel to a file of its own, and nearly all of the time that g++ takes for one goes into
headers. Here kernels are collected while pieces are compiled, written one behind the other as static functions, each
with a parser of its arguments, and compiled at once; then what waited for each gets its function.

A kernel that is more than one function (macros, templates, structs beside it) is left to Inductor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

#: More kernels than this go into several units.
LARGEST = 24

_HEAD = re.compile(r'extern "C"\s+(?:__declspec\(dllexport\)\s+)?void\s+kernel\(')
_DIRECTIVE = re.compile(r"^\s*#\s*(?!pragma\b)", re.M)
_POINTER = re.compile(r"(?:const\s+)?[A-Za-z_][\w:]*\s*\*\Z")
_NUMBERS = {"int64_t": "whole", "long": "whole", "double": "real", "float": "real"}

_HEADER = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <stdexcept>

namespace laconic {
struct PythonError {};
static void* (*data_of)(PyObject*);
static inline long long whole(PyObject* given) {
    const long long value = PyLong_AsLongLong(given);
    if (value == -1 && PyErr_Occurred()) throw PythonError();
    return value;
}
static inline double real(PyObject* given) {
    const double value = PyFloat_AsDouble(given);
    if (value == -1.0 && PyErr_Occurred()) throw PythonError();
    return value;
}
template <typename Body> static inline PyObject* guarded(Py_ssize_t given, Py_ssize_t wanted, Body&& body) {
    try {
        if (given != wanted) throw std::invalid_argument("a kernel was called with another number of operands");
        body();
        Py_RETURN_NONE;
    } catch (const PythonError&) {
    } catch (const std::exception& problem) {
        PyErr_SetString(PyExc_RuntimeError, problem.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "a kernel failed");
    }
    return nullptr;
}
}  // namespace laconic
"""

_FOOTER = """
static PyMethodDef laconic_methods[] = {{
{methods}
    {{nullptr, nullptr, 0, nullptr}}}};
static struct PyModuleDef laconic_module = {{PyModuleDef_HEAD_INIT, "{name}", nullptr, -1, laconic_methods}};
PyMODINIT_FUNC PyInit_{name}(void) {{
    const char* address = std::getenv("{variable}");
    if (address == nullptr) {{
        PyErr_SetString(PyExc_ImportError, "{variable} is not set");
        return nullptr;
    }}
    laconic::data_of = reinterpret_cast<void* (*)(PyObject*)>(std::strtoull(address, nullptr, 10));
    return PyModule_Create(&laconic_module);
}}
"""


@dataclass(eq=False)
class Kernel:
    """A kernel that waits for its unit: the types of its arguments and its source as Inductor wrote them, and the
    scopes (a dict and a name in it) that are to get its function."""

    arguments: tuple[str, ...]
    source: str
    homes: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def give(self, function: Callable[..., None]) -> None:
        for scope, name in self.homes:
            scope[name] = function


def fits(arguments: Sequence[str], source: str) -> bool:
    """Whether a kernel is one function whose arguments can be read."""
    _, body = _split(source)
    return (
        _HEAD.match(body) is not None
        and len(re.findall(r"\bkernel\b", body)) == 1
        and _DIRECTIVE.search(body) is None
        and _is_one_block(body[body.index("(") :])
        and all(_plain(argument) in _NUMBERS or _POINTER.match(argument.strip()) for argument in arguments)
    )


def _is_one_block(text: str) -> bool:
    """Whether a text ends with the brace that closes its first one."""
    depth = 0
    for found in re.finditer(r"[{}]", text):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return not text[found.end() :].strip()
    return False


def write_unit(kernels: Sequence[Kernel], name: str, variable: str) -> str:
    """The source of a Python module `name` with the functions `kernel_0`, `kernel_1` ...; it reads the address of the
    function that tells where a tensor starts from the environment `variable`."""
    includes: dict[str, None] = {}
    bodies, methods = [], []
    for number, kernel in enumerate(kernels):
        own, body = _split(kernel.source)
        includes.update(dict.fromkeys(own))
        bodies.append(_HEAD.sub(f"static void kernel_{number}(", body, count=1))
        operands = ", ".join(_operand(argument, n) for n, argument in enumerate(kernel.arguments))
        bodies.append(
            f"static PyObject* call_{number}(PyObject*, PyObject* const* given, Py_ssize_t count) {{\n"
            f"    return laconic::guarded(count, {len(kernel.arguments)}, [&] {{ kernel_{number}({operands}); }});\n}}"
        )
        pointer = f"reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_{number}))"
        methods.append(f'    {{"kernel_{number}", {pointer}, METH_FASTCALL, ""}},')
    parts = [*includes, _HEADER, *bodies, _FOOTER.format(methods="\n".join(methods), name=name, variable=variable)]
    return "\n".join(parts)


def _split(source: str) -> tuple[list[str], str]:
    """The includes that a source begins with, and the rest."""
    lines = source.strip().splitlines()
    count = 0
    while count < len(lines) and (not lines[count].strip() or lines[count].startswith("#include")):
        count += 1
    return [line for line in lines[:count] if line.strip()], "\n".join(lines[count:])


def _plain(argument: str) -> str:
    return argument.replace("const ", "").strip()


def _operand(argument: str, position: int) -> str:
    reader = _NUMBERS.get(_plain(argument))
    if reader is not None:
        return f"static_cast<{_plain(argument)}>(laconic::{reader}(given[{position}]))"
    return f"static_cast<{_plain(argument)}>(laconic::data_of(given[{position}]))"
