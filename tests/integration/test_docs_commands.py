"""Every command, option, configuration key, file and name that the documentation speaks of exists.

The tutorials and docs/errors.md are typed and run elsewhere; here each command of every page is parsed as the program itself
would parse it, and run no further.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import speft_core
from integration.pages import PAGES, ROOT, Command, blocks, commands, inline
from speft_core import UserError
from speft_hub.console import UsageError
from speft_train.config import load_config

COMMANDS = commands()
QUICKSTART = ROOT / "configs/quickstart.yaml"
READ = re.compile(r"\b(?:docs|configs|benchmarks|packages|tests|tools)/[\w./*{},-]*[\w*}]")


def key_is_known(setting: str, config: Path = QUICKSTART) -> None:
    """Raise UserError when `key=value` names a key that no configuration has; what the value may be is not asked."""
    try:
        load_config(config, [setting])
    except UserError as error:
        if "unknown key" in str(error):
            raise


def parse_speft_train(words: tuple[str, ...]) -> None:
    """As the program does, and the configuration with what is set on the command line too."""
    from speft_train import cli
    from speft_train.sweep_config import load_sweep

    group: Any = typer.main.get_command(cli.app)
    if len(words) == 1 or words[1].startswith("-"):
        return
    assert words[1] in group.commands, f"there is no speft-train {words[1]}"
    if len(words) == 2:
        return  # prose that names the command
    context = group.commands[words[1]].make_context(words[1], list(words[2:]))
    if "config" not in context.params:
        return
    path = ROOT / context.params["config"]
    overrides = [o for o in context.params["overrides"] or [] if o != "key=value"]
    config = path if path.is_file() else QUICKSTART  # CONFIG, or a file that the page lets the reader write
    if words[1] == "sweep":
        load_sweep(config, [o for o in overrides if "," not in o], context.params["grid"] or [])
    else:
        load_config(config, overrides)
    for setting in [*overrides, *(context.params.get("grid") or [])]:
        if not setting.startswith("sweep."):
            key_is_known(setting.split(",")[0])


def parse_speft_hub(words: tuple[str, ...]) -> None:
    from speft_hub.cli import app

    group: Any = typer.main.get_command(app)
    if len(words) == 1 or words[1].startswith("--"):
        assert words[1:] in ((), ("--install-completion",))
        return
    assert words[1] in group.commands, f"there is no speft-hub {words[1]}"
    if len(words) > 2:
        group.commands[words[1]].make_context(words[1], list(words[2:]))


def parse_make(words: tuple[str, ...]) -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", rules, flags=re.M)[1].split()  # type: ignore[index]
    asked = [word for word in words[1:] if "=" not in word]
    assert asked and set(asked) <= set(targets), f"the Makefile has {', '.join(targets)}"
    for word in words[1:]:
        name, _, value = word.partition("=")
        if value:
            assert re.search(rf"^{name} \?=", rules, flags=re.M), f"the Makefile reads no {name}"
            if asked == ["bench"]:
                parse_python(("python", "benchmarks/run.py", *value.split()))


def parse_python(words: tuple[str, ...]) -> None:
    """A script of this repository takes the options that are given to it: its parser names them."""
    if len(words) == 1 or not READ.match(words[1]):
        return  # `python -c`, or a file that the page lets the reader write
    if words[1].endswith("speft-train/run.py"):
        return parse_speft_train(("speft-train", "run", *words[2:]))
    assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
    source = ast.parse((ROOT / words[1]).read_text(encoding="utf-8"))
    taken = {
        word.value
        for call in ast.walk(source)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("add_argument")
        for word in call.args
        if isinstance(word, ast.Constant)
    }
    assert {word for word in words[2:] if word.startswith("--")} <= taken, f"{words[1]} takes {', '.join(sorted(taken))}"


def parse_deepspeed(words: tuple[str, ...]) -> None:
    """The launcher's own options, then a script and its words."""
    if len(words) == 1:
        return
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    options = words[1:place]
    assert set(options[::2]) <= {"--num_gpus", "--hostfile", "--master_addr"}, options
    parse_python(("python", *words[place:]))


def parse_pip(words: tuple[str, ...]) -> None:
    """What is installed is one of the packages here, or a list that is here."""
    for word in words[2:]:
        if word.endswith(".txt"):
            assert list(ROOT.rglob(word))
        elif not word.startswith("-"):
            assert re.sub(r"\[\w+]?$", "", word.strip("'")) in {"build", *(p.name for p in (ROOT / "packages").iterdir())}, word


PARSERS = {
    "speft-train": parse_speft_train, "speft-hub": parse_speft_hub, "make": parse_make, "python": parse_python,
    "deepspeed": parse_deepspeed, "pip": parse_pip,
}  # fmt: skip


@pytest.mark.parametrize("command", [c for c in COMMANDS if "──►" not in c.words], ids=str)
def test_the_command_exists_as_written(command: Command) -> None:
    try:
        PARSERS[command.words[0]](command.words)
    except UsageError as error:
        pytest.fail(f"{command}: {error.format_message()}")


def test_a_wrong_command_is_noticed() -> None:
    """The parsers above refuse what they must; commands are found in every kind of place."""
    with pytest.raises(UsageError, match="no-such"):
        parse_speft_hub(("speft-hub", "merge", "a", "b", "--out", "c", "--no-such"))
    with pytest.raises(UsageError, match="out"):
        parse_speft_hub(("speft-hub", "merge", "a", "b"))
    with pytest.raises(UserError, match="max_steps"):
        parse_python(("python", "packages/speft-train/run.py", "CONFIG", "train.max_stesp=3"))
    with pytest.raises(UserError, match="unknown key"):
        parse_speft_train(("speft-train", "sweep", "CONFIG", "--grid", "adapter.metrik=gradient,random"))
    for parse, words in (
        (parse_speft_train, ("speft-train", "rnu")), (parse_make, ("make", "tset")), (parse_make, ("make", "test", "ARG=-k")),
        (parse_make, ("make", "bench", "ARGS=--rownds 2")), (parse_python, ("python", "benchmarks/nothing.py")),
        (parse_deepspeed, ("deepspeed", "--gpus", "2", "packages/speft-train/run.py", "CONFIG")), (parse_pip, ("pip", "install", "spfet")),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            parse(words)
    assert len({c.page for c in COMMANDS}) >= 15 and {c.words[0] for c in COMMANDS} == set(PARSERS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_keys_of_the_page_exist(page: Path) -> None:
    """`section.key` and `section.key: value` in prose, and whole blocks of YAML."""
    text = page.read_text(encoding="utf-8")
    for span in inline(text):
        found = re.fullmatch(r"((?:model|data|adapter|train|deepspeed|evaluate)(?:\.\w+)+)(?:(?:=|: )(\S+))?", span)
        if found and not span.endswith(".py"):
            key_is_known(f"{found[1]}={found[2] or 'null'}")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p.read_text(encoding="utf-8"), "yaml")], ids=lambda page: page.name
)
def test_the_yaml_of_the_page_is_a_configuration(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), "yaml")):
        if "base:" in block:
            block = block.replace("base: ../", f"base: {ROOT}/configs/")
        else:
            block = f"base: {QUICKSTART}\n{block}"
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_page_points_at_is_there(page: Path) -> None:
    """Links, files of this repository, names of `speft_core`, and the environment variables of ours."""
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", link)]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = {path for span in inline(text) + blocks(text, "bash", "") for path in READ.findall(span)}
    wanted = {path for name in named for path in _alternatives(name)}
    assert [path for path in sorted(wanted) if not list(ROOT.glob(path))] == []
    files = {path.name for folder in ("packages", "benchmarks", "tests", "tools") for path in (ROOT / folder).rglob("*.py")}
    said = {span.rpartition("/")[2] for span in inline(text) if re.fullmatch(r"[\w/]+\.py", span)}
    assert said - files - {"both.py"} == set()
    names = set(re.findall(r"\bsc\.(\w+)", text))
    assert [name for name in sorted(names) if not hasattr(speft_core, name)] == []


def _alternatives(path: str) -> list[str]:
    """tests/{core,hub}/x is tests/core/x and tests/hub/x."""
    if found := re.search(r"\{([^}]*)\}", path):
        return [p for part in found[1].split(",") for p in _alternatives(path.replace(found[0], part, 1))]
    return [path]


def test_the_environment_variables_are_documented_and_read() -> None:
    variable = re.compile(r"\bSPEFT_[A-Z_]+\b")
    sources = [p.read_text(encoding="utf-8") for p in [*(ROOT / "packages").rglob("*.py"), ROOT / "tests/conftest.py"]]
    read = set(variable.findall("\n".join(sources)))
    assert read == set(variable.findall("\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
