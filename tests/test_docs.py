"""Documentation names only what exists: links, commands, options, parameters, variables, exit codes, files."""

import ast
import importlib.util
import re
import tomllib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from gptpipe.commands import cli
from gptpipe.shell import errors

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "data/sources/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SECTIONS = ("collect", "tokenize", "split", "model", "train", "evaluate")
SUFFIXES = "json|csv|md|py|html|yaml|safetensors|jsonl|txt|steps|validations|samples"
CODE_FOLDERS = ("gptpipe/", "stages/", "tests/", "benchmarks/", "recipes/", "docs/", ".ci/")
MADE_FOLDERS = ("data/", "models/", "reports/")
# Names of other programs' files that look like ours.
OTHER_FILES = {".dvc/config", ".dvc/config.local", "data/start/NAME"}


def of_pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def code_blocks(page: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block for language, block in blocks if language in languages]


def code_spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def code_lines(page: Path) -> list[str]:
    """All code spans, and the lines of shell blocks without their comments."""
    lines = [line for block in code_blocks(page, "sh") for line in block.splitlines()]
    return [re.sub(r"\s#\s.*", "", line) for line in [*lines, *code_spans(page)]]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command, split at `&&` and `|`, without the environment variables before it."""
    for line in code_lines(page):
        for command in re.split(r"&&|\\?\|", line):
            words = command.split()
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


def options_in(words: Iterable[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match("--[a-z]", word)}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def parameter_names() -> set[str]:
    """Every `section.key` of params.yaml, and the keys below it."""

    def below(prefix: str, value: object) -> Iterator[str]:
        yield prefix
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from below(f"{prefix}.{key}", inner)

    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    return {name for section, value in params.items() for name in below(section, value)}


def string_constants(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def source_text(*folders: str) -> str:
    return "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


def outputs_of_the_pipeline() -> set[str]:
    """Paths that stages write, from dvc.yaml and reports/.gitignore."""
    outputs = {f"reports{line}" for line in (ROOT / "reports/.gitignore").read_text().split()}
    for stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for item in [*stage["outs"], *stage.get("metrics", [])]:
            outputs |= {item} if isinstance(item, str) else set(item)
    return outputs


def exception_classes(base: type[errors.GptpipeError]) -> Iterator[type[errors.GptpipeError]]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from exception_classes(subclass)


@of_pages()
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: link to {target}: no such file"
        if anchor:
            assert anchor in anchors(path), (
                f"{page.name}: link to {target}: no such heading, only {anchors(path)}"
            )


@of_pages()
def test_commands_of_gptpipe_exist(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for program, *words in commands(page):
        if program != "gptpipe" or not words or not re.fullmatch("[a-z-]+", words[0]):
            continue
        asked = ["gptpipe", "--help"] if words[0].startswith("-") else ["gptpipe", words[0], "--help"]
        monkeypatch.setattr("sys.argv", asked)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0, f"{page.name}: `gptpipe {words[0]}`: no such command"
        known = options_in(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        unknown = options_in(words) - known
        assert not unknown, f"{page.name}: `gptpipe {words[0]}` has no {unknown}, only {known}"


@of_pages()
def test_modules_that_are_run_exist_and_have_their_options(page: Path) -> None:
    for words in commands(page):
        if words[:2] not in (["python", "-m"], ["python3", "-m"]) or len(words) < 3:
            continue
        module = words[2]
        path = ROOT.joinpath(*module.split("."))
        own = next((p for p in (path.with_suffix(".py"), path / "__main__.py") if p.exists()), None)
        is_ours = (ROOT / module.split(".")[0]).exists()
        assert own or (not is_ours and importlib.util.find_spec(module)), (
            f"{page.name}: python -m {module}: no module"
        )
        for option in options_in(words) if own else ():
            assert option in string_constants(own), f"{page.name}: python -m {module} has no option {option}"


@of_pages()
def test_parameters_exist(page: Path) -> None:
    known = parameter_names()
    pattern = rf"(?<![\w/.\-])(?:{'|'.join(SECTIONS)})\.(?!(?:{SUFFIXES})\b)[a-z_]+(?:\.[a-z_]+)*"
    for line in code_lines(page):
        for name in re.findall(pattern, line):
            assert name in known, f"{page.name}: `{name}` is not in params.yaml"


@of_pages()
def test_environment_variables_exist(page: Path) -> None:
    code = source_text("gptpipe", "tests")
    for name in sorted(set(re.findall(r"\bGPTPIPE_[A-Z_]+\b", page.read_text()))):
        assert f'"{name}"' in code, f"{page.name}: no code reads {name}"


@of_pages()
def test_files_exist(page: Path) -> None:
    made = outputs_of_the_pipeline()
    for span in code_spans(page):
        name = span.rstrip("/")
        if not re.fullmatch(r"[\w.*\-/]+", span) or "/" not in span or name in OTHER_FILES:
            continue
        if span.startswith(CODE_FOLDERS):
            assert list(ROOT.glob(name)), f"{page.name}: `{span}`: no such file"
        elif span.startswith(MADE_FOLDERS) and not (ROOT / name).exists():
            is_made = any(name == path or name.startswith(f"{path}/") or fnmatch(path, name) for path in made)
            assert is_made or name in {path.split("/")[0] for path in made}, (
                f"{page.name}: `{span}`: no stage writes it"
            )
        elif span.startswith(".gptpipe/"):
            part = span.split("/")[1]
            assert not part or re.search(rf'"{part}"|\.gptpipe/{part}\b', source_text("gptpipe")), (
                f"{page.name}: `{span}`: no code mentions it"
            )


@of_pages()
def test_files_at_the_root_exist(page: Path) -> None:
    written = {"dvc.lock", "mlflow.db", "manifest.json"}
    for span in code_spans(page):
        if (
            re.fullmatch(r"[\w-]+\.(ya?ml|toml|lock|db)|constraints\.txt|\.ci/run", span)
            and span not in written
        ):
            assert (ROOT / span).exists(), f"{page.name}: `{span}`: no such file"


@of_pages()
def test_dvc_settings_name_parameters(page: Path) -> None:
    known = parameter_names()
    for line in code_lines(page):
        for name in re.findall(r"-S ['\"]?([a-z_.]+)=", line):
            assert name in known, f"{page.name}: -S {name}: not in params.yaml"


@of_pages()
def test_packages_come_from_this_checkout_and_extras_exist(page: Path) -> None:
    """On the package index the name gptpipe is not ours."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in code_lines(page):
        if "pip install" not in line:
            continue
        assert not re.search(r"\bgptpipe\b", line), f"{page.name}: `{line}` installs gptpipe from the index"
        for extra in re.findall(r"\.\[([^\]]+)\]", line):
            assert set(extra.split(",")) <= set(extras), f"{page.name}: `{line}`: no such extra"


def test_messages_install_from_this_checkout() -> None:
    for path in sorted([*(ROOT / "gptpipe").rglob("*.py"), *(ROOT / "recipes").glob("*.sh")]):
        advice = re.findall(r"pip install [^`\n]*gptpipe", path.read_text())
        assert not advice, (
            f"{path.relative_to(ROOT)}: {advice} installs from the index, where the name is not ours"
        )


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs/environment-variables.md").read_text()
    constants = string_constants(ROOT / "gptpipe/shell/environment.py")
    names = {text for text in constants if re.fullmatch(r"[A-Z]+(_[A-Z]+)+|RANK", text)}
    assert len(names) >= 10  # else the pattern above no longer fits the module
    missing = sorted(name for name in names if f"`{name}`" not in page)
    assert not missing, f"docs/environment-variables.md does not name {missing}"


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs/resume-and-errors.md").read_text()
    documented = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    codes = {str(kind.exit_code) for kind in exception_classes(errors.GptpipeError)}
    assert codes <= documented, f"docs/resume-and-errors.md does not explain {sorted(codes - documented)}"


def test_every_command_is_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gptpipe", "no-such-command"])
    with pytest.raises(SystemExit):
        cli.main()
    # The message of argparse lists all commands.
    names = re.findall("[a-z]+", capsys.readouterr().err.partition("choose from")[2])
    assert "plan" in names
    text = "".join(page.read_text() for page in PAGES)
    for name in names:
        assert f"gptpipe {name}" in text, f"no page names `gptpipe {name}`"


def test_ci_finds_the_test_command_in_the_readme() -> None:
    _, marker, rest = (ROOT / "README.md").read_text().partition("<!-- test command -->\n")
    assert marker, "README.md: no line `<!-- test command -->`, which .ci/run looks for"
    assert re.match(r"```sh\n.*\bpytest\b.*\n```\n", rest), "README.md: no test command after its marker"
