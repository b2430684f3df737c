"""What the body of one function does with weights, read from its syntax tree; no code runs.

A value is followed as a set of chains: the attributes that lead to it from self.
"""

import ast
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .functions import free_variable, package
from .rules import METADATA, RULES, Rule, roles


Chain = tuple[str, ...]  # attributes that begin at self: self.a.b[i] is ("a", "b", ITEM)
Chains = frozenset[Chain]
Bindings = dict[str, Chains]  # of a function's variables
ITEM = "*"
SELF: Chains = frozenset({()})
_NONE: Chains = frozenset()
_ARGUMENT: Chain = ("?",)  # what is computed from a function's arguments
_SIGNATURE: Chain = ("!",)  # of a function, whose `parameters` are names and not tensors
_NO_CHAINS: Chains = frozenset({_ARGUMENT, _SIGNATURE})
_LONGEST = 8

# Attributes by which weights are fetched past their owner's.
FETCHES = frozenset({"parameters", "named_parameters", "state_dict", "_parameters"})
# What calls a module with other tensors in the place of its weights, past its branch.
_SUBSTITUTES = frozenset({torch.func.functional_call, torch.nn.utils.stateless.functional_call})
# What else a tensor may be asked without its values being used.
_QUESTIONS = METADATA | {"is_floating_point", "is_complex", "data_ptr"}


class Product(NamedTuple):
    """A linear call: its weight's chain, `transposed` for (in, out), and its blocks, if any."""

    chain: Chain
    transposed: bool
    blocks: tuple[str, ...] = ()


class MethodCall(NamedTuple):
    """A call of a method of self, or a read of a property; of a base class' if by super()."""

    name: str
    positional: tuple[Chains, ...] = ()
    keywords: tuple[tuple[str, Chains], ...] = ()
    by_super: bool = False


class Body(ast.NodeVisitor):
    """Reads a body in the order of its text, twice, since loops come back to what they stored.

    It finds `products`, the `fetches` of weights past their owner, by the chain where they begin,
    the `calls` of children's methods, and what is to be read next: `functions` with what is bound
    to their arguments, and `methods` of self.
    """

    def __init__(self, function: types.FunctionType, bound: Bindings, tree: ast.AST) -> None:
        self.products: set[Product] = set()
        self.fetches: set[Chain] = set()
        self.calls: set[Chain] = set()
        self.functions: list[tuple[types.FunctionType, Bindings]] = []
        self.methods: list[MethodCall] = []
        self._function = function
        count = len(inspect.signature(function, follow_wrapped=False).parameters)
        arguments = function.__code__.co_varnames[:count]
        self._variables: Bindings = dict.fromkeys(arguments, frozenset({_ARGUMENT})) | bound
        self._questions = set(_questions(tree))
        body = getattr(tree, "body")
        statements = body if isinstance(body, list) else [body]
        for statement in statements * 2:
            self.visit(statement)

    def _value(self, node: ast.AST | None) -> Chains:
        """The chains whose tensors or modules an expression's value may be or be made of."""
        if isinstance(node, ast.Name):
            return self._variables.get(node.id, _NONE)
        if isinstance(node, ast.Attribute):
            return _NONE if node.attr in METADATA else self._longer(node.value, node.attr)
        if isinstance(node, ast.Subscript):
            whole = isinstance(node.slice, ast.Slice)
            return self._value(node.value) if whole else self._longer(node.value, ITEM)
        if isinstance(node, ast.Call):
            if self._global(node.func) is inspect.signature:
                return frozenset({_SIGNATURE})
            arguments = (*node.args, *(keyword.value for keyword in node.keywords))
            return self._value(node.func).union(*map(self._value, arguments))
        if isinstance(node, _COMBINING):
            return _NONE.union(*map(self._value, ast.iter_child_nodes(node)))
        return _NONE

    def _longer(self, node: ast.AST, name: str) -> Chains:
        chains = self._value(node)
        return frozenset(chain if chain in _NO_CHAINS else (*chain, name)[:_LONGEST]
                         for chain in chains)

    def _store(self, target: ast.AST, chains: Chains) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name) and chains:
                self._variables[name.id] = self._variables.get(name.id, _NONE) | chains

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._store(target, self._value(node.value))

    def _visit_loop(self, node: Any) -> None:
        self._store(node.target, self._longer(node.iter, ITEM))
        self.generic_visit(node)

    visit_For = visit_comprehension = _visit_loop

    def _visit_generators_first(self, node: Any) -> None:
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _visit_generators_first

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            self._add_product(RULES["matmul"], node.left, node.right)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        chains = self._value(node.value)
        if node.attr in FETCHES and node not in self._questions and chains != {_SIGNATURE}:
            self.fetches |= (chains - _NO_CHAINS) or {()}
        if chains == SELF:  # a property; methods are followed with their arguments too
            self.methods.append(MethodCall(node.attr))

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in FETCHES:
            self.fetches.add(())

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        for chain in self._value(node.func):
            if len(chain) > 1 and chain[-1] != "forward":
                self.calls.add(chain)
        if isinstance(node.func, ast.Attribute):
            self._add_method_call(node, node.func)
        called = self._global(node.func)
        try:
            rule = RULES.get(called)
        except TypeError:  # what is called cannot be a key
            return
        keywords = {keyword.arg or "": keyword.value for keyword in node.keywords}
        if called in _SUBSTITUTES:
            self.fetches |= (self._value(node) - _NO_CHAINS) or {()}
        if rule is not None:
            self._add_product(rule, *rule.operands(node.args, keywords))
        for weight, role in roles(called, node.args, keywords):
            for chain in self._value(weight) - _NO_CHAINS:
                self.products.add(Product(chain, role.transposed, role.blocks))
        if isinstance(called, types.FunctionType) and package(called) != "torch":
            names = called.__code__.co_varnames[:called.__code__.co_argcount]
            arguments = dict(zip(names, node.args)) | keywords
            bound = {name: self._value(argument) for name, argument in arguments.items()}
            if any(chains - _NO_CHAINS for chains in bound.values()):
                self.functions.append((called, bound))

    def _add_method_call(self, node: ast.Call, method: ast.Attribute) -> None:
        """Add what a call `value.method(...)` reaches or computes."""
        if self._value(method.value) == SELF:
            positional = tuple(map(self._value, node.args))
            keywords = tuple((k.arg, self._value(k.value)) for k in node.keywords if k.arg)
            self.methods.append(MethodCall(method.attr, positional, keywords))
        owner = method.value
        if isinstance(owner, ast.Call) and getattr(owner.func, "id", None) == "super":
            self.methods.append(MethodCall(method.attr, by_super=True))
        rule = RULES.get(method.attr)
        if rule is not None and len(node.args) == 1:
            self._add_product(rule, owner, node.args[0])

    def _add_product(self, rule: Rule, x: Any, weight: Any) -> None:
        """Add a product of x with a weight, or of a weight, on the left, with x."""
        left, right = self._value(x), self._value(weight)
        if _ARGUMENT not in right and (_ARGUMENT in left or not left):
            for chain in right - _NO_CHAINS:
                self.products.add(Product(chain, rule.transposed))
        if rule.transposed and _ARGUMENT not in left and (_ARGUMENT in right or not right):
            for chain in left - _NO_CHAINS:
                self.products.add(Product(chain, False))

    def _global(self, node: ast.AST) -> Any:
        """The global that an expression such as `F.linear` names, or None."""
        if isinstance(node, ast.Name):
            if node.id in self._variables:
                return None
            free = free_variable(self._function, node.id)
            return self._function.__globals__.get(node.id, free)
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            is_module = isinstance(owner, types.ModuleType)
            return getattr(owner, node.attr, None) if is_module else None
        return None


# Expressions whose value may be any of their parts, or be made of them.
_COMBINING = (ast.BinOp, ast.BoolOp, ast.IfExp, ast.Tuple, ast.List, ast.Starred, ast.NamedExpr,
              ast.ListComp, ast.GeneratorExp, ast.UnaryOp)


def _questions(tree: ast.AST) -> Iterator[ast.AST]:
    """The fetches of which only a dtype or the like is asked: next(self.parameters()).dtype."""
    asked = {id(node.value) for node in ast.walk(tree)
             if isinstance(node, ast.Attribute) and node.attr in _QUESTIONS}

    def only_asked(names: set[str], within: ast.AST) -> bool:
        for node in ast.walk(within):
            if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
                if id(node) not in asked:
                    return False
        return True

    for node in ast.walk(tree):
        if _is_next(node) and id(node) in asked:
            yield from ast.walk(node.args[0])  # type: ignore[attr-defined]
        elif isinstance(node, ast.Assign) and _is_next(node.value):
            target = node.targets[0]
            if isinstance(target, ast.Name) and only_asked({target.id}, tree):
                yield from ast.walk(node.value)
        elif isinstance(node, (ast.GeneratorExp, ast.ListComp)):
            names = set(_names_in(generator.target for generator in node.generators))
            if only_asked(names, node):
                for generator in node.generators:
                    yield from ast.walk(generator.iter)


def _is_next(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", None) == "next"


def _names_in(targets: Iterator[ast.AST]) -> Iterator[str]:
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                yield node.id
