"""Rules of the project that nobody has to remember, because they are kept here."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import bitmend.errors
from bitmend.protocols import ADAPTERS, COMPENSATORS, FORMATS, REPARAMETERISATIONS, SOLVERS, TRANSFORMS

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bitmend"
TESTS = ROOT / "tests"
MEBIBYTE = 2**20

# Methods that need no citation: everybody's first idea.
COMMON_KNOWLEDGE = {"rtn", "fold_batch_norm"}
METHODS = [SOLVERS, TRANSFORMS, REPARAMETERISATIONS, COMPENSATORS]
PARTS = [*METHODS, ADAPTERS, FORMATS]

# Addresses of one machine. Written so that this line is none itself.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home/\w+|Users/\w+)/")

DECISION_PARTS = ["Context", "Decision", "Alternatives", "What would change our mind"]


# ---------------------------------------------------------------------------------------------- what there is to check
@cache
def project_files() -> tuple[Path, ...]:
    """All files that are in git or about to be; without git (an unpacked archive), all but those in hidden folders."""
    if not (ROOT / ".git").exists():
        found = (path for path in ROOT.rglob("*") if path.is_file())
        return tuple(
            path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts[:-1])
        )
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return tuple(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def text_of(path: Path) -> str | None:
    """The text of a file, or None where it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def mirrored_test(module: Path) -> Path:
    inside = module.relative_to(SOURCE)
    return TESTS / inside.parent / f"test_{inside.name}"


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with its dotted name, `torch.load` for example."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of all imported packages."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def has_keyword(call: ast.Call, name: str, value: object) -> bool:
    values = [word.value for word in call.keywords if word.arg == name]
    return any(isinstance(node, ast.Constant) and node.value is value for node in values)


# ---------------------------------------------------------------------------------------------- layout
def test_every_module_has_its_mirrored_test():
    exempt = {"__init__.py", "__main__.py"}
    missing = [
        f"{relative(module)} -> {relative(mirrored_test(module))}"
        for module in modules()
        if module.name not in exempt and not mirrored_test(module).exists()
    ]
    assert not missing, "modules without a test file:\n" + "\n".join(missing)


def test_no_drawer_for_everything():
    drawers = {"utils", "common", "helpers", "core", "misc"}
    found = [relative(path) for path in SOURCE.rglob("*") if path.stem in drawers and path.suffix in {"", ".py"}]
    assert not found, f"name these after the mathematics that they hold: {found}"


def test_files_in_git_are_small():
    large = [relative(path) for path in project_files() if path.stat().st_size > 15 * MEBIBYTE]
    assert not large, f"files over 15 MiB: {large}"


def test_embedded_assets_are_small():
    size = sum(path.stat().st_size for path in (SOURCE / "assets").rglob("*") if path.is_file())
    assert 0 < size < 40 * MEBIBYTE


# ---------------------------------------------------------------------------------------------- what source must not do
def test_only_the_command_line_and_the_report_print():
    def may_print(path: Path) -> bool:
        inside = path.relative_to(SOURCE)
        return inside.parts[0] in {"cli.py", "report"}

    found = [
        f"{relative(path)}:{call.lineno}"
        for path in modules()
        if not may_print(path)
        for name, call in calls(tree_of(path))
        if name == "print"
    ]
    assert not found, f"print in library code: {found}"


def test_no_pickle():
    packages = {"pickle", "cloudpickle", "dill", "joblib"}
    found = [relative(path) for path in modules() if imported(tree_of(path)) & packages]
    found += [
        f"{relative(path)}:{call.lineno}"
        for path in modules()
        for name, call in calls(tree_of(path))
        if (name == "torch.load" and not has_keyword(call, "weights_only", True))
        or name == "torch.save"
        or has_keyword(call, "allow_pickle", True)
    ]
    assert not found, f"pickle, torch.save, or torch.load without weights_only=True: {found}"


def test_remote_code_is_never_trusted_by_itself():
    found = [
        f"{relative(path)}:{call.lineno}"
        for path in modules()
        for _, call in calls(tree_of(path))
        if has_keyword(call, "trust_remote_code", True)
    ]
    assert not found, f"trust_remote_code must come from the user: {found}"


def test_torchvision_is_neither_used_nor_installed():
    assert not [relative(path) for path in modules() if "torchvision" in imported(tree_of(path))]
    assert importlib.util.find_spec("torchvision") is None, "torchvision breaks transformers' imports; uninstall it"


def test_no_path_of_one_machine():
    found = []
    for path in project_files():
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{relative(path)}:{number}")
    assert not found, f"paths of one machine: {found}"


# ---------------------------------------------------------------------------------------------- registered parts
def registered() -> list[tuple[str, object]]:
    """(kind, entry) of every part that bitmend itself registers; tests and examples may have added theirs."""
    return [
        (registry.kind, entry)
        for registry in PARTS
        for entry in registry
        if str(getattr(entry.part, "__module__", "")).startswith("bitmend.")
    ]


def test_something_is_registered():
    assert {"rtn", "gptq"} <= {entry.name for entry in SOLVERS}


def test_every_method_names_its_paper():
    nameless = [entry.name for registry in METHODS for entry in registry if not entry.paper]
    undeclared = set(nameless) - COMMON_KNOWLEDGE - {entry.name for entry in foreign_entries()}
    assert not undeclared, f"name the paper in register(...), or declare common knowledge here: {sorted(undeclared)}"
    assert set(nameless) >= COMMON_KNOWLEDGE, "COMMON_KNOWLEDGE lists a method that names its paper, or is gone"


def foreign_entries() -> list:
    own = {id(entry) for _, entry in registered()}
    return [entry for registry in PARTS for entry in registry if id(entry) not in own]


def test_every_part_says_what_it_is_and_has_a_test_file():
    problems = []
    for kind, entry in registered():
        if not entry.summary:
            problems.append(f"{kind} {entry.name}: its docstring has no first line")
        module = SOURCE.joinpath(*entry.part.__module__.split(".")[1:]).with_suffix(".py")
        if not mirrored_test(module).exists():
            problems.append(f"{kind} {entry.name}: no {relative(mirrored_test(module))}")
    assert not problems, "\n".join(problems)


def test_every_recipe_parses():
    from bitmend.pipeline.recipe import RECIPES_FOLDER, load_recipe

    files = sorted({*RECIPES_FOLDER.glob("*.toml"), *(ROOT / "recipes").glob("*.toml")})
    assert files, "no recipe is shipped"
    for file in files:
        assert load_recipe(file).name == file.stem
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        assert first.startswith("#"), f"{file.name} must begin with a comment that says what it should give"


# ---------------------------------------------------------------------------------------------- errors
def error_classes() -> set[str]:
    root = bitmend.errors.QuantizationError
    return {
        name
        for name, value in vars(bitmend.errors).items()
        if isinstance(value, type) and issubclass(value, root) and value is not root
    }


def raised_in(path: Path) -> set[str]:
    raised = [node.exc for node in ast.walk(tree_of(path)) if isinstance(node, ast.Raise) and node.exc is not None]
    calls_or_names = [value.func if isinstance(value, ast.Call) else value for value in raised]
    return {ast.unparse(value).rpartition(".")[2] for value in calls_or_names}


def matched_in(path: Path) -> set[str]:
    """Error classes that the file expects in `pytest.raises(..., match=...)`."""
    found: set[str] = set()
    for name, call in calls(tree_of(path)):
        if name.endswith("raises") and call.args and any(word.arg == "match" for word in call.keywords):
            expected = [node for node in ast.walk(call.args[0]) if isinstance(node, ast.Name | ast.Attribute)]
            found |= {ast.unparse(node).rpartition(".")[2] for node in expected}
    return found


def test_every_error_class_is_raised_somewhere():
    never = error_classes().difference(*(raised_in(path) for path in modules()))
    assert not never, f"error classes that nothing raises: {sorted(never)}"


def test_every_error_class_has_a_test_that_reads_its_sentence():
    unread = error_classes().difference(*(matched_in(path) for path in TESTS.rglob("test_*.py")))
    assert not unread, f"error classes whose sentence no `pytest.raises(..., match=...)` reads: {sorted(unread)}"


# ---------------------------------------------------------------------------------------------- documents
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".md"]


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a Markdown file."""
    headings = re.findall(r"^#+\s+(.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_resolve():
    broken = []
    for document in documents():
        prose = FENCE.sub("", document.read_text(encoding="utf-8"))
        for match in LINK.finditer(prose):
            target = match.group(1) or match.group(2)
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            file = document.parent / place if place else document
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
                broken.append(f"{relative(document)}: {target}")
    assert not broken, f"links that lead nowhere: {broken}"


def test_every_document_can_be_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / (match.group(1) or "")).resolve() for match in LINK.finditer(index)}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md") if path.name != "index.md"}
    results = {page for page in pages if page.parent.name == "results" and page.name != "README.md"}
    lost = sorted(relative(page) for page in pages - results - linked)
    assert not lost, f"docs/index.md does not link: {lost}"


def test_decisions_have_the_same_four_parts_and_fit_a_page():
    files = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [file.name[:4] for file in files] == [f"{number:04d}" for number in range(1, len(files) + 1)]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == DECISION_PARTS, file.name
        assert len(text.splitlines()) <= 60, f"{file.name} is longer than a page"


def test_changelog_has_a_numerics_heading():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for release in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        assert "### Numerics" in release, f"say under Numerics what changes a code or a score: {release[:20]!r}"


def test_versions_agree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {version}\n" in citation
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_importing_bitmend_is_silent_and_light():
    """Nothing is printed, and no optional package is needed."""
    code = "import sys, bitmend; assert not {'compressed_tensors', 'datasets', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
