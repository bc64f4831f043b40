"""Write docs/api/ from `pyro_gen.__all__`, one page for each role, so that the reference cannot go stale.

A public name goes on the page of the module that defines it, under that module's docstring. A module without an entry
in `TITLES` gets a page of its own name: nothing public can be missing.
"""

import inspect
import shutil
from pathlib import Path
from types import ModuleType

from sphinx.application import Sphinx

TITLES = {  # module of the package -> title of its page, in the order of the pages
    "programs": "Programs: the families",
    "base": "Contracts: kinds, objectives, evidence",
    "objectives": "Objectives",
    "transforms": "Transforms: the layers of flows",
    "fitting": "Fitting",
    "bayes": "Posteriors of the weights",
    "posteriors": "Posteriors of the weights",
    "evidence": "Evidence",
    "samplers": "Samplers",
    "handlers": "Any Pyro program",
    "inference_data": "ArviZ",
    "comparison": "Comparison",
    "diagnostics": "Diagnostics",
    "plots": "Plots",
    "datasets": "Data sets",
    "testing": "Checking a program",
}

# classes whose methods are not ours to tell
OTHERS = "Module, ELBO, ELBOModule, Generic, Protocol, tuple, BaseException, TorchDispatchMode"


def heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def home(name: str, obj: object) -> str:
    """Full name of the module that defines a public object."""
    return obj.__name__ if isinstance(obj, ModuleType) else str(getattr(obj, "__module__", None) or "pyro_gen")


def members(module: ModuleType) -> list[str]:
    """Public names of a public module: its `__all__`, else what it defines."""
    own = [n for n, o in vars(module).items() if not n.startswith("_") and home(n, o).startswith(module.__name__)]
    return list(getattr(module, "__all__", [n for n in own if not isinstance(getattr(module, n), ModuleType)]))


def directive(path: str, obj: object) -> list[str]:
    if inspect.isclass(obj):
        options = [":members:", f":inherited-members: {OTHERS}", ":exclude-members: module_class", ":show-inheritance:"]
        return [f".. autoclass:: {path}", *(f"   {option}" for option in options), ""]
    return [f".. autofunction:: {path}" if callable(obj) else f".. autodata:: {path}", ""]


def write_pages(folder: Path) -> None:
    import pyro_gen

    pages: dict[str, list[tuple[str, object]]] = {}
    for name in pyro_gen.__all__:
        if name.startswith("__"):
            continue
        obj = getattr(pyro_gen, name)
        role = home(name, obj).removeprefix("pyro_gen.").split(".")[0]
        page = pages.setdefault(TITLES.get(role, role), [])
        if isinstance(obj, ModuleType):
            page += [(f"{name}.{member}", getattr(obj, member)) for member in members(obj)]
        else:
            page.append((name, obj))

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    order = list(dict.fromkeys(TITLES.values()))
    titles = sorted(pages, key=lambda t: (order.index(t) if t in order else len(order), t))
    for number, title in enumerate(titles):
        lines = [*heading(title, "="), ".. currentmodule:: pyro_gen", "", ".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {path}" for path, _ in pages[title]] + [""]
        told = set()
        for path, obj in pages[title]:
            lines += heading(path, "-")
            if (module := home(path, obj)).startswith("pyro_gen.") and module not in told:
                told.add(module)
                lines += [f".. automodule:: {module}", "   :no-members:", "   :no-index:", ""]
                lines += [".. currentmodule:: pyro_gen", ""]
            lines += directive(f"pyro_gen.{path}", obj)
        slug = title.split(":")[0].lower().replace(" ", "_")
        (folder / f"{number:02d}_{slug}.rst").write_text("\n".join(lines), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    write_pages(Path(app.srcdir) / "api")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
