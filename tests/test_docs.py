"""What README and docs say is so: links lead somewhere, code runs, commands and files exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import fgbg_cuda
from fgbg_cuda import _C, words
from fgbg_cuda.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
TEXTS += sorted(ROOT.glob("results/**/README.md"))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, or of none."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings, as mkdocs and GitHub name them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p.read_text(), "python")], ids=lambda page: page.stem
)
def test_code_of_the_docs_runs(page: Path):
    names: dict = {}
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, f"{page.name}", "exec"), names)


def test_every_page_is_in_the_menu():
    menu = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(menu) == [page.name for page in PAGES]


def test_every_public_name_is_on_the_page_of_the_api():
    listed = re.findall(r"members: \[(.*)\]", (ROOT / "docs" / "api.md").read_text())
    names = {name.strip() for line in listed for name in line.split(",")}
    modules = {"distributions", "functional", "nn"}  # nn and distributions are there as a whole
    assert set(fgbg_cuda.functional.__all__) <= set(fgbg_cuda.__all__)
    assert set(fgbg_cuda.__all__) - modules <= names
    words = names - set(fgbg_cuda.__all__)
    assert words == {"Reduction", "Likelihood", "Parameterization", "Channels", "Normalize"}


def test_every_public_name_of_the_program_is_on_its_page():
    pytest.importorskip("lightning")
    from fgbg_cuda import vae

    listed = re.findall(r"members: \[(.*)\]", (ROOT / "docs" / "vae.md").read_text())
    names = {name.strip() for line in listed for name in line.split(",")}
    assert all(hasattr(vae, name) for name in names)
    documented = {
        name for name in vae.__all__ if name.endswith(("Module", "VAE", "ELBO", "Model", "Networks"))
    }
    assert documented <= names


def test_what_the_argument_of_determinism_names_is_in_the_code():
    code = ""
    for pattern in ("csrc/**/*.*", "python/fgbg_cuda/functional/*.py"):
        code += "".join(file.read_text() for file in sorted(ROOT.glob(pattern)))
    there = set(re.findall(r"\w+", code))
    spans = re.findall(r"`([^`\n/]+)`", without_code((ROOT / "docs" / "determinism.md").read_text()))
    named = {w for span in spans if " " not in span for w in re.findall(r"[A-Za-z_]\w{3,}", span)}
    elsewhere = {"make", "torch", "use_deterministic_algorithms", "True", "parallel_for"}
    assert len(named) > 20
    assert named - elsewhere <= there


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in TEXTS:
        text = page.read_text()
        code = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)
        assert set(code) <= targets, page.name


def test_presets_exist():
    presets = {path.stem for path in (ROOT / "python/fgbg_cuda/configs").glob("*.yaml")}
    named = set()
    for page in TEXTS:
        named |= set(re.findall(r"--config (\w+)(?![\w./])", page.read_text()))
    assert named <= presets
    tables = (ROOT / "README.md").read_text() + (ROOT / "docs" / "separating.md").read_text()
    assert all(f"`{preset}`" in tables for preset in presets)


def test_commands_of_the_docs_are_understood(capsys):
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("the command line's extras are not installed")
    lines = {
        line.split("#")[0].strip()
        for page in TEXTS
        for block in blocks(page.read_text())
        for line in block.splitlines()
        if line.startswith("fgbg fit")
    }
    assert lines
    for line in sorted(lines):
        with pytest.raises(SystemExit) as ended:
            main([*line.split()[1:], "--print_config"])
        assert ended.value.code in (0, None), line
        assert "class_path: fgbg_cuda.vae." in capsys.readouterr().out, line


def test_messages_that_troubleshooting_quotes_are_said():
    said = ""
    for pattern in ("CMakeLists.txt", "cmake/*.cmake", "python/fgbg_cuda/**/*.py"):
        for file in sorted(ROOT.glob(pattern)):
            said += re.sub(r'"\s*\n\s*f?"', "", file.read_text())  # strings that go on in the next line
    quoted = re.findall(
        r"^### `(.*?)`", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE
    )
    assert len(quoted) >= 4
    for message in quoted:
        for part in re.split(r"\s*…\s*", message):
            assert part in said, message


def test_files_of_the_contributors_page_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [p for p in re.findall(r"`([\w./-]+/[\w.-]*)`", text) if not re.search(r"X|FAMILY|DEVICE", p)]
    assert len(paths) > 30
    folders = (ROOT, ROOT / "csrc", ROOT / "python" / "fgbg_cuda", ROOT / "python" / "fgbg_cuda" / "vae")
    for path in paths:
        made = path.startswith(("build/", "runs/"))
        assert made or any((folder / path).exists() for folder in folders), path


def test_the_version_stands_once():
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    told = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert newest == told == fgbg_cuda.__version__.partition("+")[0]  # a wheel adds that of torch


# --- what type checkers are told ------------------------------------------------------------------


def test_the_types_of_the_extension_are_of_its_functions():
    stub = ast.parse((ROOT / "python/fgbg_cuda/_C.pyi").read_text())
    functions = [node for node in stub.body if isinstance(node, ast.FunctionDef)]
    told = {f.name: len(f.args.posonlyargs) for f in functions}
    there = {
        name: len(re.findall(r"\barg\d+: ", f.__doc__)) for name, f in vars(_C).items() if name[0] != "_"
    }
    assert told == there


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("reduction", words.Reduction),
        ("likelihood", words.Likelihood),
        ("composition", words.Composition),
        ("parameterization", words.Parameterization),
    ],
)
def test_words_are_those_of_cpp(option: str, choices: object):
    x = torch.zeros(1, 1, 2)
    named = {"composition": "plain", "likelihood": "gaussian", "reduction": "sum", option: "?"}
    call, arguments = _C.gaussian_kl, (x, x, None, None, "?", "sum", 1)
    if option != "parameterization":
        call = _C.reconstruction_loss
        composition, likelihood, reduction = (named[k] for k in ("composition", "likelihood", "reduction"))
        images = (x, None, x, None, None, 1.0, 1.0, None)
        arguments = (*images, composition, likelihood, 1.0, 1.0, False, reduction, False)
    with pytest.raises(ValueError, match=rf"^{option} is '\?', expected one of ") as error:
        call(*arguments)
    there = tuple(re.findall(r"'(\w+)'", str(error.value).partition("expected")[2]))
    assert there == get_args(choices)


def test_words_of_the_reference():
    assert tuple(fgbg_cuda.reference.LIKELIHOODS) == get_args(words.Likelihood)
