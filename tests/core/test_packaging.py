"""Facts about what the registry and ComfyUI-Manager read: pyproject.toml, requirements.txt, .comfyignore."""

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

REPO = Path(__file__).parents[2]
CONFIG = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = CONFIG["project"], CONFIG["tool"]["comfy"]
TRIPLE = re.compile(r"\d+\.\d+\.\d+")
LIMIT = 2**20  # of a file that is not a weight


def lines(name: str) -> list[str]:
    text = (REPO / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def tracked() -> list[str]:
    """What git knows, or will with the next `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository, so what is packed cannot be told")
    return [path for path in done.stdout.splitlines() if (REPO / path).is_file()]


def ignored(path: str) -> bool:
    """The two kinds of pattern that .comfyignore has: /folder/ and /file."""
    return any(fnmatch(f"/{path}", f"{line}*" if line.endswith("/") else line) for line in lines(".comfyignore"))


def test_the_registry_id_is_one_it_takes():
    name = PROJECT["name"]
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*[a-z0-9]", name) and len(name) < 100
    assert "comfy" not in name


def test_the_version_is_a_triple():
    assert TRIPLE.fullmatch(PROJECT["version"])


def test_the_extra_all_names_this_project_and_every_other_extra():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    name, inner = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", everything).groups()
    assert name == PROJECT["name"]
    assert set(inner.split(",")) == set(extras) - {"all"}


def test_comfyui_is_asked_for_by_a_floor():
    assert re.fullmatch(rf">={TRIPLE.pattern}", COMFY["requires-comfyui"])


def test_javascript_is_served_once():
    """With both, ComfyUI 0.33 serves the folder under two names and runs the scripts twice."""
    assert "web" not in COMFY
    assert 'WEB_DIRECTORY = "./js"' in (REPO / "__init__.py").read_text(encoding="utf-8")


def test_the_registry_gets_what_it_asks_for():
    assert COMFY["PublisherId"] and COMFY["DisplayName"] and PROJECT["description"] and PROJECT["license"]
    assert PROJECT["urls"]["Repository"].startswith("https://")
    assert (REPO / PROJECT["readme"]).is_file()


def test_every_system_classifier_is_one_comfy_knows():
    """One unknown entry drops them all."""
    systems = [entry for entry in PROJECT["classifiers"] if entry.startswith("Operating System :: ")]
    known = ("Microsoft", "POSIX", "MacOS", "OS Independent")
    assert systems and all(entry.partition(" :: ")[2].startswith(known) for entry in systems)


def test_the_requirements_are_dependencies_with_the_same_floors():
    assert set(lines("requirements.txt")) <= set(PROJECT["dependencies"])


def test_no_dependency_has_a_ceiling():
    asked = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    assert [entry for entry in asked if re.search(r"[<=~!]=?\s*\d", entry.replace(">=", ""))] == []


def test_the_package_holds_all_that_runs():
    packed = [path for path in tracked() if not ignored(path)]
    for part in ("__init__.py", "requirements.txt", "LICENSE", "README.md", "js/timeline.js"):
        assert part in packed
    weights = REPO / "unifusion_core" / "weights"
    needed = {path.relative_to(REPO).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert needed and needed <= set(packed)


def test_the_package_holds_nothing_else():
    packed = [path for path in tracked() if not ignored(path)]
    assert [path for path in packed if path.startswith(("tests/", "docs/", ".ci/")) or path == "LOG.md"] == []
    assert {path.partition("/")[0] for path in packed if path.startswith(".")} == set()
    large = [path for path in packed if (REPO / path).stat().st_size > LIMIT]
    assert [path for path in large if not path.startswith("unifusion_core/weights/")] == []


@pytest.mark.parametrize("path", ["tests/core/test_lap.py", "docs/results/x.json", "LOG.md", ".ci/run"])
def test_what_is_left_out(path):
    assert ignored(path)


@pytest.mark.parametrize("path", ["js/docs/UniFusionRefine.md", "workflows/edit.json", "locales/fr/nodeDefs.json"])
def test_what_is_kept(path):
    assert not ignored(path)
