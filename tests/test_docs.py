"""The documentation is true: its code runs, its names, links, options, metrics and messages exist."""

import ast
import builtins
import dataclasses
import functools
import importlib
import json
import pkgutil
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion
from experiments import digits
from experiments.digits.glossary import GLOSSARY
from experiments.pod_plan import plan as pod_plan
from experiments.solver_cost import cost as solver_cost
from experiments.text_to_image.__main__ import Options as TextToImage
from tests.tiny_runs import blank

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TINY = dict(
    steps=4, pretrain_steps=20, pretrain_batch=32, width=16, depth=1, iterations=2, batch=24, minibatches=2, epochs=1,
    reference_samples=64, evaluation_samples=64, evaluate_every=2, checkpoint_every=1,
)  # fmt: skip

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one of the same or a higher level."""
    level, text = heading.count("#"), page.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.M | re.S)
    assert found, f"{page} has no heading {heading!r}"
    return found[1]


def first_cells(text: str) -> list[str]:
    """Names in backticks in the first column of the tables of a text."""
    return [name for row in re.findall(r"^\|([^|]*)\|", text, re.M) for name in re.findall(r"`([^`]+)`", row)]


# --- the two commands


def test_the_first_screen_has_exactly_two_commands():
    first_screen = README.read_text(encoding="utf-8").split("\n## ")[0]
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", first_screen, re.M | re.S) for line in block.splitlines()]
    assert len(commands) == 2
    main_job, tests = commands
    assert main_job.endswith(" && .venv/bin/python -m experiments.digits --out runs/digits")
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for command, extras in zip(commands, ("experiments", "test,torch")):
        assert command.startswith(f"python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[{extras}]' && ")
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert (ROOT / "constraints.txt").exists() and PROJECT["requires-python"] == ">=3.11"
    assert "![" in first_screen, "a figure belongs on the first screen"


# --- the code


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, classifiers):
    """A folder in which the first command has been run, on a tiny budget, with blank figures."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.digits.report.png", blank)
        digits.run(digits.Config(out=folder / "runs" / "digits", **TINY))
    return folder


def execute(code: str, folder: Path, monkeypatch) -> dict:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(digits, "Config", functools.partial(digits.Config, **TINY))
    names = {"__name__": "documentation"}
    exec(compile(code, "documentation", "exec"), names)
    return names


@pytest.mark.slow
def test_fifteen_lines_of_the_library(tmp_path, monkeypatch, capsys):
    code = blocks(README, "python")[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15
    names = execute(code, tmp_path, monkeypatch)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    best, start, end = (float(x) for x in (names["exact"].optimal_value(), printed[0].split()[5], printed[-1].split()[5]))
    # the first line is the reference, whose objective is its mean reward 0 +- 4 std / sqrt(batch)
    assert abs(start) < 4 * 2.1 / np.sqrt(names["info"].rewards.size)
    assert 0.7 * best < end < best + 4 * 2.1 / np.sqrt(names["info"].rewards.size)


LIBRARY_BLOCKS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]
LIBRARY_BLOCKS = [(page, i) for page, i in LIBRARY_BLOCKS if page != README or i in (2, 3)]  # the others have their own tests
LIBRARY_BLOCKS = [(page, i) for page, i in LIBRARY_BLOCKS if page.name != "solvers.md"]  # fragments: see test_solvers_docs.py


@pytest.mark.slow
@pytest.mark.parametrize(("page", "index"), LIBRARY_BLOCKS, ids=lambda v: v.stem if isinstance(v, Path) else str(v))
def test_code_runs(page, index, workspace, monkeypatch):
    execute(blocks(page, "python")[index], workspace, monkeypatch)


@pytest.mark.slow
def test_your_own_reward_data_and_network(tmp_path, monkeypatch):
    *_, code = python = blocks(README, "python")
    assert len(python) == 5
    names = execute(code, tmp_path, monkeypatch)
    assert np.isfinite(names["metrics"]["relative_gap"])
    load = next(span for span in spans(README) if "network=network" in span)
    model = eval(load, {"ctrl_diffusion": ctrl_diffusion, "network": names["network"]})
    assert bool(jnp.all(jnp.isfinite(model.sample(jax.random.key(0), 2))))


# --- names


NEED_TORCH = ("experiments.benchmark.pytorch",)
PACKAGES = ("ctrl_diffusion", "experiments", "jax", "equinox", "diffrax", "optax", "numpy", "optimistix", "lineax")
FILES = re.compile(r".*\.(py|md|json|jsonl|html|png|npz|toml|cff|txt|safetensors|pt|pth)")


def member(found, name: str):
    """An attribute, a field without a default, or a submodule; raises `AttributeError`."""
    if hasattr(found, name):
        return getattr(found, name)
    if any(name in getattr(base, "__annotations__", {}) for base in getattr(found, "__mro__", ())):
        return None
    try:
        return importlib.import_module(f"{getattr(found, '__name__', '')}.{name}")
    except ImportError as error:
        raise AttributeError(name) from error


def resolves(dotted: str) -> bool:
    """Whether a name is that of an object, in a known package or, in short, in this one."""
    first, *rest = dotted.split(".")
    try:
        found = importlib.import_module(first) if first in PACKAGES else member(ctrl_diffusion, first)
        for name in rest:
            found = member(found, name)
    except AttributeError:
        return False
    return True


@each_page
def test_names_exist(page):
    dotted = [re.sub(r"\(.*\)$", "", span) for span in spans(page)]
    dotted = [name for name in dotted if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name) and not FILES.fullmatch(name)]
    assert [name for name in dotted if not resolves(name)] == []


@each_page
def test_classes_exist(page):
    modules = [importlib.import_module(name) for name in PACKAGES]
    for package in (ctrl_diffusion, importlib.import_module("experiments")):
        walk = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", importlib.import_module)
        modules += [importlib.import_module(module.name) for module in walk if module.name not in NEED_TORCH]
    known = {name for module in (builtins, *modules) for name in vars(module)}
    assert [span for span in spans(page) if re.fullmatch(r"(?:[A-Z][a-z0-9]+){2,}", span) and span not in known] == []


@each_page
def test_files_and_tests_that_are_mentioned_exist(page):
    for span in spans(page):
        file, _, test = span.partition("::")
        if re.fullmatch(r"(ctrl_diffusion|solvers|experiments|tests|docs)/[\w/.]*", file):
            assert (ROOT / file).exists(), span
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), span


# --- links


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@each_page
def test_pages_are_finished_and_name_no_machine(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"\{\{\w*\}\}|TODO|FIXME", text) == []
    assert re.findall(r"(?<![\w.])/(?:work|home|tmp|root|Users|mnt|opt|usr|var)\b[^\s)`]*", text) == []


@each_page
def test_mathematics_survives_markdown(page):
    """Inline: no backslash before punctuation (Markdown removes it), no blank inside the dollars, none left open."""
    for line in re.sub(r"`[^`\n]*`", "", prose(page)).splitlines():
        assert line.count("$") % 2 == 0, line
        for formula in re.findall(r"\$([^$]*)\$", line):
            assert formula == formula.strip() and not re.search(r"\\[^A-Za-z]|\^\*", formula), formula


# --- the page of the experiment


DIGITS = ROOT / "docs" / "digits.md"


def test_every_option_is_listed_with_its_default():
    rows = dict(re.findall(r"^\| `--([\w.-]+)` \| (.*?) \|", section(DIGITS, "## Options"), re.M))
    fields = {}
    for f in dataclasses.fields(digits.Config):
        name, inner = f.name.replace("_", "-"), f.default if dataclasses.is_dataclass(f.default) else None
        fields |= {f"{name}.{g.name}": g.default for g in dataclasses.fields(inner)} if inner else {name: f.default}
    assert list(rows) == list(fields)
    for name, default in fields.items():
        assert ("`" not in rows[name]) if default is None else (rows[name] == f"`{default}`"), (name, default)


@each_page
def test_options_that_are_mentioned_exist(page):
    known = {
        f"--{f.name.replace('_', '-')}"
        for config in (digits.Config, pod_plan.Config, solver_cost.Config, TextToImage)
        for f in dataclasses.fields(config)
    }
    for span in spans(page):
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
            assert option in known | {"--help"}, option


@pytest.mark.slow
def test_every_metric_is_explained(workspace):
    explained = set(first_cells(section(DIGITS, "## Metrics")))
    names = {name for group in GLOSSARY.values() for name in group}
    names |= set(json.loads((workspace / "runs" / "digits" / "metrics.json").read_text()))
    assert {name for name in names if not name.endswith("_se")} - explained == set()


@pytest.mark.slow
def test_every_number_of_the_history_is_explained(workspace):
    explained = set(first_cells(section(DIGITS, "### History"))) | {"phase"}
    rows = map(json.loads, (workspace / "runs" / "digits" / "history.jsonl").read_text().splitlines())
    names = {name for row in rows for name in row if row["phase"] == "finetune" and not name.endswith("_se")}
    assert names - explained == set()


@pytest.mark.slow
def test_every_file_of_a_run_is_explained(workspace):
    explained = {name.rstrip("/") for name in first_cells(section(DIGITS, "## The files in `--out`"))}
    assert {path.name for path in (workspace / "runs" / "digits").iterdir()} == explained


def templates() -> list[str]:
    """All strings of the code; what is formatted in becomes an ellipsis."""
    found = []
    for folder in ("ctrl_diffusion", "solvers", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    messages, known = first_cells(section(DIGITS, "## When something goes wrong")), templates()
    assert len(messages) > 10
    assert [message for message in messages if not any(message in template for template in known)] == []


@pytest.mark.slow
@each_page
def test_logs_are_those_of_the_code(page):
    """Every line of a log is a message of the code with something filled in, or a bar that it draws."""
    known = [template.strip() for template in templates() if len(template.replace("…", "").strip()) >= 8]
    patterns = [re.compile(".*".join(map(re.escape, template.split("…")))) for template in known if "\n" not in template]
    for line in "".join(blocks(page, "log")).splitlines():
        bar = re.match(r"(pre-training|fine-tuning): .*(step|iteration)", line)
        assert bar or any(pattern.fullmatch(line) for pattern in patterns), line


# --- versions


def test_versions_agree():
    version = ctrl_diffusion.__version__
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
