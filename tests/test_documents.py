"""The Markdown files say nothing of the repository that is not so: links, paths, commands, lists of modules.

Each check is a function from a text to what is wrong with it, tried on a wrong text too.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hatchling.builders.wheel import WheelBuilder

from dfkd_ray import cli, config
from dfkd_ray.config import fields
from helpers import options_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dfkd_ray"
FOLDERS = ("", ".github", "dfkd_ray", "sweeps", "tests")
DOCUMENTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.md" if folder in ("", ".github") else "**/*.md")
    if path.is_file()
)
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
MOST_LINES = 220  # of the README
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
ELSEWHERE = re.compile(r"[a-z][a-z0-9+]*:")
MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|tmp|work|mnt|media|Users|opt|var|scratch)/|[A-Z]:\\")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|TBD)\b")
OPERATOR = re.compile(r"[();<>|&]+")
ENTRY = re.compile(r"( +)(\S+) {2,}(.+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and its text."""

    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    return [Block(*found) for found in FENCE.findall(text)]


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """The inline code of a document, each in one line."""
    return [" ".join(found.split()) for found in SPAN.findall(prose(text))]


def anchors(text: str) -> set[str]:
    """What the headings of a document can be reached by, as GitHub names them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.M):
        plain = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{number}" if number else name)
    return names


def wrong_links(text: str, document: Path) -> list[str]:
    """Relative links to files or headings that there are not."""
    wrong = []
    for link in LINK.findall(SPAN.sub(lambda span: span[0] if "](" not in span[0] else "", prose(text))):
        if ELSEWHERE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.is_relative_to(ROOT) or not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(text if target == document else target.read_text(encoding="utf-8")):
            wrong.append(f"{link}: no such heading")
    return wrong


def wrong_paths(text: str, document: Path) -> list[str]:
    """Paths of the repository, in inline code or in commands, that lead to nothing.

    A path is of the repository where it begins with a name that stands at its root, or is that of a Python file.
    """
    own = {path.name for path in ROOT.iterdir()} - {"runs", "results", "dist", ".venv", ".git"}
    commands = " ".join(block.text for block in blocks(text) if block.language in ("sh", "python"))
    words = {word for span in spans(text) for word in span.split()}
    words |= {word for word in commands.split() if word.startswith("sweeps/")}
    wrong = []
    for word in sorted(words):
        if not PATH.fullmatch(word) or not (word.partition("/")[0] in own or word.endswith(".py")):
            continue
        if not any((folder / word).exists() for folder in (ROOT, document.parent)):
            wrong.append(f"{word}: no such file")
    return wrong


def wrong_yaml(text: str) -> list[str]:
    """Blocks of YAML that are none, or hold nothing."""
    wrong = []
    for block in blocks(text):
        if block.language in ("yaml", "yml"):
            try:
                if not isinstance(yaml.safe_load(block.text), dict | list):
                    wrong.append(f"a block holds no mapping and no list: {block.text[:60]!r}")
            except yaml.YAMLError as error:
                wrong.append(str(error))
    return wrong


def wrong_python(text: str) -> list[str]:
    """Blocks of Python that do not compile."""
    wrong = []
    for block in blocks(text):
        if block.language == "python":
            try:
                compile(block.text, "block", "exec")
            except SyntaxError as error:
                wrong.append(str(error))
    return wrong


def words_of(line: str) -> Iterator[list[str]]:
    """The words behind each `dfkd-ray` in a line of a shell, up to the next operator."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[str] | None = None
    for word in lexer:
        if OPERATOR.fullmatch(word):
            if found is not None:
                yield found
            found = None
        elif found is None:
            found = [] if word.rpartition("/")[2] == "dfkd-ray" else None
        else:
            found.append(word)
    if found is not None:
        yield found


def wrong_words(words: list[str]) -> str | None:
    """What the command line does not know of the words behind `dfkd-ray`, if anything."""
    command: Any = typer.main.get_command(cli.app)
    rest, path = list(words), "dfkd-ray"
    num_arguments = 0
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if word.startswith("-"):
            options = {
                each: parameter for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)
            }
            if name not in options and name != "--help":
                return f"{path}: no option {name}"
            if name == "--help" or options[name].is_flag or equals:
                continue
            if not rest:
                return f"{path}: no value after {name}"
            value = rest.pop(0)
            field = value.partition("=")[0]
            if name == "--set" and field not in FIELDS and not re.fullmatch(r"[A-Z_.]+", field):
                return f"{path}: --set {value}: no such field"
        elif hasattr(command, "commands"):
            if word == "COMMAND":
                return None
            if word not in command.commands:
                return f"{path}: no command {word}"
            command, path = command.commands[word], f"{path} {word}"
        elif word != "…":
            num_arguments += 1
    if hasattr(command, "commands"):
        return None if words == ["--help"] else f"{path}: which command?"
    taken = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    if num_arguments > len(taken) and all(parameter.nargs == 1 for parameter in taken):
        return f"{path}: {num_arguments} arguments, it takes {len(taken)}"
    return None


SECTIONS = {"pruning", "student", "synthesis", "distillation", "reference"}
FOREIGN = {
    "--help",
    "--block",
    "--newest",
    "--soak-minutes",
    "--fuzz-seed",
    "--fuzz-only",
}  # of every command, of Ray, of the tests
FIELDS = fields.known_fields(config.TrialConfig) | fields.known_fields(config.TeacherTrainingConfig)


def wrong_commands(text: str) -> list[str]:
    """Command lines in blocks of sh, and in inline code, that name a command, option or field that there is not."""
    scripts = [block.text.replace("\\\n", " ") for block in blocks(text) if block.language in ("sh", "bash", "console")]
    lines = [line for script in scripts for line in script.splitlines() if "dfkd-ray" in line]
    lines += [span for span in spans(text) if re.match(r"(?:\S*/)?dfkd-ray ", span)]
    found = []
    for line in lines:
        try:
            found += [wrong for words in words_of(line) if (wrong := wrong_words(words))]
        except ValueError as error:
            found.append(f"{line}: {error}")
    return found


def wrong_names(text: str) -> list[str]:
    """Options and dotted fields of a trial in inline code, outside of any command, that there are not."""
    known = options_of(typer.main.get_command(cli.app)) | FOREIGN
    wrong = []
    for span in spans(text):
        words = span.split()
        if span.startswith("--"):
            wrong += [f"no option {word}" for word in words if word.startswith("--") and word not in known]
        names = [after for word, after in pairwise(words) if word == "--set"] or words[:1]
        found = [name.partition("=")[0] for name in names]
        wrong += [f"no field {name}" for name in found if name.partition(".")[0] in SECTIONS and name not in FIELDS]
    return wrong


def wrong_places(text: str) -> list[str]:
    """Paths of somebody's machine, and what was left to do."""
    found = [f"path of a machine: {match[0]}" for match in MACHINE.finditer(text)]
    return found + [f"left to do: {match[0]}" for match in UNFINISHED.finditer(text)]


def listed(text: str) -> set[str]:
    """The modules and packages in a document's tree, by their paths in the package."""
    (tree,) = (block.text for block in blocks(text) if block.text.startswith("dfkd_ray/\n"))
    found, folder = set(), ""
    for line in tree.splitlines()[1:]:
        name = line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folder = folder if depth == 2 else name if name.endswith("/") else ""
        found.add(name if depth == 1 else folder + name)
    return found


def difference(said: set[str], there: set[str]) -> list[str]:
    """What a list names that there is not, and what it lacks."""
    return [f"{name}: there is none" for name in sorted(said - there)] + [
        f"{name}: not listed" for name in sorted(there - said)
    ]


def top_level() -> set[str]:
    """The packages, folders and modules at the root of the package."""
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    return packages | {path.name for path in PACKAGE.glob("*.py")} | {"bundled/"}


def test_every_page_is_looked_at():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    beside_code = {
        "dfkd_ray/models/README.md",
        "dfkd_ray/fleet/README.md",
        "dfkd_ray/fleet/CLUSTER.md",
        "dfkd_ray/records/README.md",
        "dfkd_ray/exporting/README.md",
    }
    assert {
        "README.md",
        ".github/CONTRIBUTING.md",
        "sweeps/README.md",
        "dfkd_ray/bench/README.md",
        *beside_code,
    } <= names


@by_document
def test_a_page_is_true_of_the_repository(document):
    text = document.read_text(encoding="utf-8")
    wrong = wrong_links(text, document) + wrong_paths(text, document) + wrong_yaml(text) + wrong_python(text)
    wrong += wrong_commands(text) + wrong_names(text) + wrong_places(text)
    assert not wrong, "\n".join(wrong)


def test_the_readme_is_short_and_its_list_of_the_package_is_complete():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert difference(listed(text), top_level()) == []


def test_the_list_of_modules_is_complete():
    said = listed((ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8"))
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert difference(said, modules | {name for name in top_level() if name.endswith("/")}) == []


def test_every_page_can_be_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(prose(page.read_text(encoding="utf-8")))]
        pages = {(page.parent / link).resolve() for link in links if link.endswith(".md") and not ELSEWHERE.match(link)}
        todo += sorted(pages - reached - set(todo))
    assert set(DOCUMENTS) <= reached


def test_a_wheel_has_the_pages_beside_the_code_and_the_files_that_they_speak_of():
    held = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    wanted = [
        "exporting/README.md",
        "fleet/CLUSTER.md",
        "fleet/hosts.yaml",
        "fleet/rayjob.yaml",
        "models/README.md",
        "records/README.md",
        "records/record.schema.json",
    ]
    assert {f"dfkd_ray/{name}" for name in wanted} <= held
    assert not [name for name in held if not name.startswith("dfkd_ray/")]


PAGE = ROOT / "README.md"


@pytest.mark.parametrize(
    "text",
    [
        "[a](nothing.md)",
        "![a](sweeps/nothing.png)",
        "# A b\n[a](#c)",
        "[a](sweeps/README.md#nothing)",
        "[a](../elsewhere)",
    ],
)
def test_a_link_to_nothing_is_found(text):
    assert len(wrong_links(text, PAGE)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[a](LICENSE)",
        "# A `b`, c: d\n[a](#a-b-c-d)",
        "# A\n# A\n[a](#a-1)",
        "[a](https://example.org/b#c)",
        "```sh\n[a](nothing)\n```",
    ],
)
def test_a_link_to_something_is_not(text):
    assert wrong_links(text, PAGE) == []


@pytest.mark.parametrize(
    "text", ["`dfkd_ray/bench.py`", "see `nothing.py`", "`tests/nothing/`", "```sh\nsweep sweeps/no.yaml\n```"]
)
def test_a_path_to_nothing_is_found(text):
    assert len(wrong_paths(text, PAGE)) == 1


def test_paths_of_users_and_of_results_are_not_of_the_repository():
    assert wrong_paths("`runs/first/student` `row.json` `train/<class>/` `dfkd_ray/bench/` `dfkd_ray_*`", PAGE) == []


@pytest.mark.parametrize("text", ["a: [1", "", "just words", "a: 1\n a: 2"])
def test_a_block_that_is_no_yaml_is_found(text):
    assert len(wrong_yaml(f"```yaml\n{text}\n```\n")) == 1 and not wrong_yaml("```yaml\na: [1]\n```\n")


def test_a_block_that_is_no_python_is_found():
    assert len(wrong_python("```python\ndef\n```\n")) == 1 and not wrong_python("```python\na = 1\n```\n")


@pytest.mark.parametrize(
    "line",
    [
        "dfkd-ray recoverr NAME --out OUT",
        "dfkd-ray teacher fit NAME",
        "dfkd-ray bench",
        "dfkd-ray recover NAME --out OUT --sparcity 0.5",
        "dfkd-ray recover NAME --out OUT --set synthesis.bn_wight=1",
        "dfkd-ray recover NAME OTHER --out OUT",
        "dfkd-ray recover NAME --out",
        "true && .venv/bin/dfkd-ray swept FILE",
        "for a in b c; do dfkd-ray teacher record $a --datasets D; done",
        "dfkd-ray sweep FILE \\\n    --result PLACE",
        "ray job submit -- dfkd-ray sweep FILE --synthesiser 1-8",
    ],
)
def test_a_command_that_there_is_not_is_found(line):
    assert len(wrong_commands(f"```sh\n{line}\n```\n")) == 1
    assert "\n" in line or line.split()[0] != "dfkd-ray" or len(wrong_commands(f"see `{line}`")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "dfkd-ray recover NAME --out=OUT --set FIELD=VALUE  # not --sparcity",
        "dfkd-ray results PLACE --where 'sparsity>=0.75' --sort reference_kl",
        "dfkd-ray --debug cache ls && other --option",
        "dfkd-ray sweep FILE --no-download > file.txt",
        'dfkd-ray teacher train resnet18 --arguments \'{"stem": "cifar"}\' --dataset D --set image_size=28 --out O',
        "dfkd-ray --help",
        "dfkd-ray --debug COMMAND",
    ],
)
def test_a_command_that_there_is_is_not(line):
    assert wrong_commands(f"```sh\n{line}\n```\n") == []


@pytest.mark.parametrize(
    "span", ["--synthesiser 1-8", "synthesis.bn_wight", "--set pruning.kind=lamp", "student.arch=a"]
)
def test_an_option_or_field_that_there_is_not_is_found(span):
    assert len(wrong_names(f"see `{span}`")) == 1


@pytest.mark.parametrize(
    "span", ["--synthesizers 1-8", "synthesis.bn_weight", "--set pruning.criterion=lamp", "synthesis"]
)
def test_an_option_or_field_that_there_is_is_not(span):
    assert wrong_names(f"see `{span}`") == []


@pytest.mark.parametrize("top", ["home", "tmp", "work", "root", "mnt"])
@pytest.mark.parametrize("around", ["in {}", "`{}`", "({})"])
def test_paths_of_machines_are_found(top, around):
    assert len(wrong_places(around.format(f"/{top}/me/runs"))) == 1


@pytest.mark.parametrize("text", ["TODO: more", "to be done (FIXME)"])
def test_what_is_left_to_do_is_found(text):
    assert len(wrong_places(text)) == 1


@pytest.mark.parametrize("text", ["`~/.cache/dfkd_ray`", "s3://bucket/tmp/x", "a/home/b", "/dev/null", "todo"])
def test_other_words_are_not(text):
    assert wrong_places(text) == []


def test_a_list_that_names_too_much_or_too_little_is_found():
    tree = textwrap.dedent(
        """
        ```
        dfkd_ray/
          cli/              the commands
            run.py          recover, sweep
          losses.py         losses
        ```
        """
    )
    assert listed(tree) == {"cli/", "cli/run.py", "losses.py"}
    assert difference({"a", "b"}, {"b", "c"}) == ["a: there is none", "c: not listed"]
