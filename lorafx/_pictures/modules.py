"""An injected model by the paths of its modules: what each is, and which sites are in it."""

from torch import fx, nn

from .._adapter.names import dotted, split_block
from .._graph.modules import named_modules
from .._model.branches import Branch, branches
from .._model.lower import linear_forward
from .._model.program import Program
from .._model.regions import users_class
from .._summary import Summary


class Modules:
    """An injected model by paths: what each module is, and which sites are in it."""

    def __init__(self, program: Program, summary: Summary) -> None:
        self.program, self.summary = program, summary
        self.users = program.modules
        self.rows = {row.name: row for row in summary.sites}
        self.names: dict[nn.Module | None, str] = {}
        for name, branch in branches(program.model).items():
            if name in self.rows:
                self.names[branch] = name
        self._holding: dict[str, list[str]] = {}
        for path, module in named_modules(program.model, every_name=True):
            if isinstance(module, Branch) and module in self.names:
                owner = path.rpartition(".")[0]
                while True:
                    self._holding.setdefault(owner, []).append(self.names[module])
                    if not owner:
                        break
                    owner = owner.rpartition(".")[0]

    def sites_in(self, path: str) -> list[str]:
        """The sites in a module, by their names."""
        return self._holding.get(path, [])

    def kind(self, path: str) -> str:
        """`region` if a module has a graph, `break` if it stays Python, else `module`."""
        if path in self.program.graphs:
            return "region"
        return "break" if path in self.summary.breaks else "module"

    def kind_in_words(self, path: str) -> str:
        """The same as one reads it; a graph that is run as it was is no region."""
        if self.kind(path) == "region":
            rewritten = isinstance(self.users[path], fx.GraphModule)
            return "region" if rewritten else "straight-line code"
        return {"break": "graph break", "module": ""}[self.kind(path)]

    def class_name(self, path: str) -> str:
        """The user's class of a module."""
        return users_class(self.users[path]).__name__

    def why(self, path: str) -> str:
        """Why a graph break is one, without its class."""
        return self.summary.breaks[path].partition(": ")[2]

    def children(self, path: str) -> list[str]:
        """The paths of the modules in one."""
        own = self.users[path]._modules
        return [dotted(path, name) for name in own if dotted(path, name) in self.users]

    def own_sites(self, path: str) -> list[str]:
        """The sites whose weights a module has itself."""
        children = self.users[path]._modules.values()
        return [self.names[child] for child in children if child in self.names]

    def trained_in(self, path: str) -> str:
        """The tensors in a module that adapters train whole, by their names in it."""
        prefix = dotted(path, "")
        return ", ".join(name.removeprefix(prefix) for name in self.summary.trained
                         if name.startswith(prefix))

    def own_trained(self, path: str) -> str:
        """Those of the tensors that a module has itself."""
        return ", ".join(name.rpartition(".")[2] for name in self.summary.trained
                         if split_block(name)[0].rpartition(".")[0] == path)

    def single(self, path: str) -> list[str]:
        """The sites of a module that is one adapted linear call and no more, else none."""
        return self.sites_in(path) if linear_forward(self.users[path]) is not None else []

    def repeated(self) -> str:
        """The first module that holds sites and has siblings of its class that do; else the model.

        A layer that is itself a site is none.
        """
        for path in self.users:
            alike: dict[type, list[str]] = {}
            for child in self.children(path):
                if self.sites_in(child) and not self.own_sites(child):
                    alike.setdefault(users_class(self.users[child]), []).append(child)
            for group in alike.values():
                if len(group) > 1:
                    return group[0]
        return ""
