"""What the Python of a graph break does with weights, read from its source.

Whatever Python reads of an adapted weight is adapted (`_weight`), so nothing here decides whether adapters are right.
It answers two questions about the code that a forward reaches. Which tensors are the weights of linear calls, so that
they are sites: `F.linear(x, self.w)`, `x @ self.experts[i]`? And which weights are fetched past the attribute that
holds them, `dict(self.named_parameters())["w"]`, so that they cannot be adapted?
"""

import ast
import contextlib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .rules import METADATA, RULES, Rule, roles


Names = tuple[str, ...]
Chains = frozenset[Names]  # attributes that begin at self: self.a.b[i] is ("a", "b", ITEM)
ITEM = "*"
_GIVEN = ("?",)  # the chain of what is computed from a function's arguments
FETCHES = frozenset({"parameters", "named_parameters", "state_dict", "_parameters"})
_NONE: Chains = frozenset()


class Product(NamedTuple):
    """A linear call in Python: the chain of its weight, whether that is (in, out), and its blocks of rows, if any."""

    names: Names
    transposed: bool
    blocks: tuple[str, ...] = ()


class Facts(NamedTuple):
    """What the code reached from one method does: products, fetches by the chain they start at, methods of children."""

    products: frozenset[Product]
    fetches: Chains
    calls: Chains


@functools.lru_cache(maxsize=None)
def facts_of(cls: type, method: str) -> Facts:
    """What a method of a class does, and all code that it reaches."""
    reader = _SourceReader(cls)
    reader.follow_method(method)
    reader.run()
    return Facts(frozenset(reader.products), frozenset(reader.fetches), frozenset(reader.calls))


class _SourceReader:
    """Reads functions from their source, each with what its arguments may be; `cls` is the class of self."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.products: set[Product] = set()
        self.fetches: set[Names] = set()
        self.calls: set[Names] = set()
        self.seen: set[Any] = set()
        self.waiting: list[tuple[types.FunctionType, dict[str, Chains]]] = []

    def run(self) -> None:
        """Read everything that has been followed to."""
        while self.waiting:
            function, bound = self.waiting.pop()
            tree = _tree(function.__code__)
            if tree is None:
                self.fetches |= {()} if FETCHES & {*function.__code__.co_names} else set()
            else:
                _Body(self, function, bound, tree).read()

    def follow(self, function: types.FunctionType, bound: dict[str, Chains]) -> None:
        """Read this function too, unless it has been with these arguments."""
        if package(function) == __name__.partition(".")[0]:
            return  # what reads adapted weights
        key = function.__code__, tuple(sorted((name, chains) for name, chains in bound.items()))
        if key not in self.seen and len(self.seen) < 500:
            self.seen.add(key)
            self.waiting.append((function, bound))

    def follow_method(
        self, name: str, arguments: Mapping[str, Chains] | None = None, above: type | None = None
    ) -> None:
        """Read the methods or properties of this name that the class and its bases define, `above` one of them."""
        mro = self.cls.__mro__
        for base in mro[mro.index(above) + 1:] if above in mro else mro:
            for function in _functions(vars(base).get(name)) if base not in (nn.Module, object) else ():
                names = function.__code__.co_varnames[:function.__code__.co_argcount]
                self.follow(function, {**(arguments or {}), **({names[0]: frozenset({()})} if names else {})})


class _Body(ast.NodeVisitor):
    """Reads one function's body in the order of its text, twice, since a loop may come back to what it has stored."""

    def __init__(self, reader: _SourceReader, function: types.FunctionType, bound: dict[str, Chains], tree: ast.AST) -> None:
        self.reader, self.function, self.tree = reader, function, tree
        arguments = function.__code__.co_varnames[:len(inspect.signature(function, follow_wrapped=False).parameters)]
        self.locals: dict[str, Chains] = dict.fromkeys(arguments, frozenset({_GIVEN})) | bound
        self.innocent: set[ast.AST] = set()

    def read(self) -> None:
        """Visit the body."""
        self._excuse_questions()
        body = getattr(self.tree, "body")
        for part in (body if isinstance(body, list) else [body]) * 2:
            self.visit(part)

    def value(self, node: ast.AST | None) -> Chains:
        """The chains whose tensors or modules an expression's value may be or be made of."""
        if isinstance(node, ast.Name):
            return self.locals.get(node.id, _NONE)
        if isinstance(node, ast.Attribute):
            return _NONE if node.attr in METADATA else self._longer(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            return self.value(node.value) if isinstance(node.slice, ast.Slice) else self._longer(node.value, ITEM)
        if isinstance(node, ast.Call):
            return self.value(node.func).union(*map(self.value, (*node.args, *(k.value for k in node.keywords))))
        if isinstance(node, (ast.BinOp, ast.BoolOp, ast.IfExp, ast.Tuple, ast.List, ast.Starred, ast.NamedExpr,
                             ast.ListComp, ast.GeneratorExp, ast.UnaryOp)):
            return _NONE.union(*map(self.value, ast.iter_child_nodes(node)))
        return _NONE

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._store(target, self.value(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._store(node.target, self._longer(node.iter, ITEM))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._store(node.target, self._longer(node.iter, ITEM))
        self.generic_visit(node)

    def _visit_comprehensions_first(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_comprehensions_first

    def _longer(self, node: ast.AST, name: str) -> Chains:
        return frozenset(chain if chain == _GIVEN else (*chain, name)[:8] for chain in self.value(node))

    def _store(self, target: ast.AST, chains: Chains) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and chains:
                self.locals[name.id] = self.locals.get(name.id, _NONE) | chains

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            self._note(RULES["matmul"], node.left, node.right)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if node.attr in FETCHES and node not in self.innocent:
            self.reader.fetches |= (self.value(node.value) - {_GIVEN}) or {()}
        if self.value(node.value) == {()}:
            self.reader.follow_method(node.attr)  # a property; methods are followed with their arguments too

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in FETCHES:
            self.reader.fetches.add(())

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.reader.calls |= {chain for chain in self.value(node.func) if len(chain) > 1 and chain[-1] != "forward"}
        if isinstance(node.func, ast.Attribute):
            if self.value(node.func.value) == {()}:
                self._follow_own(node.func.attr, node)
            if isinstance(node.func.value, ast.Call) and getattr(node.func.value.func, "id", None) == "super":
                self.reader.follow_method(node.func.attr, above=_definer(self.reader.cls, self.function))
            rule = RULES.get(node.func.attr)
            if rule is not None and len(node.args) == 1:
                self._note(rule, node.func.value, node.args[0])
        called = self._called(node.func)
        try:
            rule = RULES.get(called)
        except TypeError:  # what is called cannot be a key
            return
        given = {keyword.arg or "": keyword.value for keyword in node.keywords}
        if called in _SUBSTITUTES:
            self.reader.fetches |= (self.value(node) - {_GIVEN}) or {()}
        if rule is not None:
            self._note(rule, *rule.operands(node.args, given))
        for weight, role in roles(called, node.args, given):
            for chain in self.value(weight) - {_GIVEN}:
                self.reader.products.add(Product(chain, role.transposed, role.blocks))
        if isinstance(called, types.FunctionType) and package(called) != "torch":
            arguments = dict(zip(called.__code__.co_varnames[:called.__code__.co_argcount], node.args)) | given
            bound = {name: self.value(argument) for name, argument in arguments.items()}
            if any(chains - {_GIVEN} for chains in bound.values()):
                self.reader.follow(called, bound)

    def _note(self, rule: Rule, x: Any, weight: Any) -> None:
        """Note a product: of x with a weight, or of a weight, on the left, with x."""
        left, right = self.value(x), self.value(weight)
        for chain in right if _GIVEN not in right and (_GIVEN in left or not left) else ():
            self.reader.products.add(Product(chain, rule.transposed))
        for chain in left if rule.transposed and _GIVEN not in left and (_GIVEN in right or not right) else ():
            self.reader.products.add(Product(chain, False))

    def _follow_own(self, name: str, node: ast.Call) -> None:
        """Read a method of self with the arguments of this call."""
        method = inspect.getattr_static(self.reader.cls, name, None)
        for function in _functions(method)[:1]:
            names = function.__code__.co_varnames[not isinstance(method, staticmethod):function.__code__.co_argcount]
            given = dict(zip(names, node.args)) | {k.arg: k.value for k in node.keywords if k.arg}
            self.reader.follow_method(name, {key: self.value(argument) for key, argument in given.items()})

    def _called(self, node: ast.AST) -> Any:
        """The global that an expression such as `F.linear` names, or None."""
        if isinstance(node, ast.Name):
            known = self.function.__globals__.get(node.id, _cell(self.function, node.id))
            return None if node.id in self.locals else known
        if isinstance(node, ast.Attribute):
            holder = self._called(node.value)
            return getattr(holder, node.attr, None) if isinstance(holder, types.ModuleType) else None
        return None

    def _excuse_questions(self) -> None:
        """Find the fetches of which only a dtype, device or the like is asked: next(self.parameters()).dtype."""
        asked = {id(node.value) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)
                 and (node.attr in METADATA or node.attr in _KINDS)}

        def only_asked(names: set[str], within: ast.AST) -> bool:
            return all(id(node) in asked for node in ast.walk(within) if isinstance(node, ast.Name)
                       and node.id in names and isinstance(node.ctx, ast.Load))

        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "next" and id(node) in asked:
                self.innocent |= {*ast.walk(node.args[0])}
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if getattr(node.value.func, "id", None) == "next" and isinstance(node.targets[0], ast.Name):
                    self.innocent |= {*ast.walk(node.value)} if only_asked({node.targets[0].id}, self.tree) else set()
            elif isinstance(node, (ast.GeneratorExp, ast.ListComp)):
                names = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
                if only_asked(names, node):
                    self.innocent |= {n for g in node.generators for n in ast.walk(g.iter)}


# What calls a module with other tensors in the place of its weights, beside which its branch would stand.
_SUBSTITUTES = frozenset({torch.func.functional_call, torch.nn.utils.stateless.functional_call})
_KINDS = frozenset({"is_floating_point", "is_complex", "data_ptr"})


def package(function: types.FunctionType) -> str:
    """The top-level package that a function is of."""
    return (function.__module__ or "").partition(".")[0]


def _definer(cls: type, function: types.FunctionType) -> type | None:
    """The class of the MRO in which this function is a method."""
    return next((base for base in cls.__mro__ if function in _functions(vars(base).get(function.__name__))), None)


def _cell(function: types.FunctionType, name: str) -> Any:
    names = function.__code__.co_freevars
    if name in names:
        with contextlib.suppress(ValueError):
            return (function.__closure__ or ())[names.index(name)].cell_contents
    return None


@functools.lru_cache(maxsize=None)
def _tree(code: types.CodeType) -> ast.AST | None:
    """The syntax tree of a function, or None where its source is not to be had."""
    try:
        source = textwrap.dedent(inspect.getsource(code))
        parsed = ast.parse(source)
    except (OSError, SyntaxError, TypeError):
        return None
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = [node for node in ast.walk(parsed) if isinstance(node, kinds)]
    return next((node for node in found if getattr(node, "name", "<lambda>") == code.co_name), None)


def _functions(function: object) -> list[types.FunctionType]:
    """A function and all that it wraps: properties, static and class methods, decorators' closures."""
    if isinstance(function, property):
        function = function.fget
    if isinstance(function, functools.cached_property):
        function = function.func
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    if not isinstance(function, types.FunctionType):
        return []
    held = [value for value in enclosed(function) if value is not function]
    return [function, *(inner for value in held for inner in _functions(value))]


def enclosed(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over, but for cells that are empty yet."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
