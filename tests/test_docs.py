"""Documentation that runs: examples of docstrings and of the user guide; an API page that names all that is public."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib.pyplot
import pytest

import vqad

matplotlib.use("agg")

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = Path(__file__).parent.parent / "examples"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = (
    "vqad",
    "vqad.datasets",
    "vqad.display",
    "vqad.explain",
    "vqad.metrics",
    "vqad.model_selection",
    "vqad.prototypes",
    "vqad.report",
    "vqad.testing",
)
MODULES = [m.name for m in pkgutil.walk_packages(vqad.__path__, "vqad.") if not m.name.endswith("__main__")]

needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason="docs are not in the source distribution")


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    matplotlib.pyplot.close("all")


def run(test):
    """Run a doctest; what it printed goes to the captured output."""
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(test)
    assert result.attempted > 0
    assert result.failed == 0


def docstring_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        for test in finder.find(importlib.import_module(name)):
            if not all(example.options.get(doctest.SKIP) for example in test.examples):  # those of several machines
                yield pytest.param(test, id=test.name)


@pytest.mark.parametrize("test", list(docstring_examples()))
def test_the_examples_of_docstrings_run(test):
    run(test)


@pytest.mark.slow
@needs_docs
def test_the_user_guide_runs_from_its_first_page_to_its_last():
    guide = DOCS / "guide"
    toctree = (guide / "index.rst").read_text(encoding="utf-8").split(".. toctree::")[1]
    pages = ["index", *re.findall(r"^   (\w+)$", toctree, flags=re.M)]
    assert {f"{page}.rst" for page in pages} == {path.name for path in guide.glob("*.rst")}
    names: dict = {}
    for page in pages:
        path = guide / f"{page}.rst"
        test = doctest.DocTestParser().get_doctest(path.read_text(encoding="utf-8"), names, page, str(path), 0)
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, clear_globs=False)
        assert result.failed == 0, page
        names = test.globs


@needs_docs
@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_page_names_every_public_object(module):
    page = (DOCS / "api.rst").read_text(encoding="utf-8")
    named = set(re.findall(r"^   (\w+)$|^\.\. py:data:: (\w+)$", page, flags=re.M))
    public = {name for name in importlib.import_module(module).__all__ if not name.startswith("__")}
    assert public <= {a or b for a, b in named}


@needs_docs
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("plot_*.py")), ids=lambda path: path.stem)
def test_gallery_examples_use_parameters_and_names_that_exist(path):
    """They run when the site is built; what has been renamed should show up earlier."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree).splitlines()[1].startswith("==="), "a title, underlined"
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vqad":
            module = importlib.import_module(node.module)
            imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
    assert imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            parameters = getattr(imported.get(node.func.id), "_parameter_constraints", None)
            if parameters is not None:
                assert {keyword.arg for keyword in node.keywords if keyword.arg} <= parameters.keys()
