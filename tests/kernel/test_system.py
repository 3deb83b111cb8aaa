from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.kernel.system import SystemConfig, SystemFileError, _line
from llmos.syscalls.labels import Labels, Sensitivity

GOOD = """\
# A demo
[system]
metrics_port = 0
name = "demo"

[[devices]]
driver = "cpu"
memory = "2GiB"
threads = 1

[models.chat]
source = "built-in"
engine = "echo"
device = "cpu:0"

[models.embed]
source = "built-in"
engine = "hash"

[corpora.help]
tenant = "acme"
path = "help"
embedder = "embed"
driver = "memory"
sensitivity = "confidential"
trusted = false

[graphs.things]
path = "things.csv"

[rules.desk]
path = "/abs/desk.clp"

[[agents]]
program = "programs:Desk"
tenant = "acme"

[[agents]]
program = "programs:Desk"
tenant = "acme"
key = "second"
config = { model = "chat" }
"""


def parse(text: str) -> SystemConfig:
    return SystemConfig.parse(text, "system.toml", Path("/base"))


def test_a_whole_system_is_read() -> None:
    system = parse(GOOD)
    assert system.system.name == "demo"
    assert (system.devices[0].name, system.devices[0].memory) == ("cpu:0", 2 << 30)
    assert (system.models["chat"].kind, system.models["embed"].kind) == ("causal", "encoder")
    assert not system.models["chat"].needs_files
    help_ = system.corpora["help"]
    assert help_.labels == Labels(
        tenants=frozenset({"acme"}), sensitivity=Sensitivity.CONFIDENTIAL, trusted=False
    )
    assert system.graphs["things"].labels == Labels(sensitivity=Sensitivity.INTERNAL)
    assert system.at(help_.path) == Path("/base/help")
    assert system.at(system.rules["desk"].path) == Path("/abs/desk.clp")
    assert [a.key for a in system.agents] == ["main", "second"]
    assert system.agents[1].config == {"model": "chat"}


def test_nothing_at_all_is_a_system() -> None:
    assert parse("").system.name == "system"


MISTAKES = {
    "syntax": ('name = "demo"', 'name = "demo', 4, "", "line 4"),
    "cut off": ('config = { model = "chat" }', "config = {", 42, "", "line"),
    "key twice": ('engine = "echo"', 'engine = "echo"\nengine = "echo"', 14, "", ""),
    "unknown table": ("[system]", "[sistem]", 2, "sistem", "unknown field"),
    "unknown field": ("threads = 1", "treads = 1", 9, "devices.0.treads", "unknown field"),
    "misspelt and so missing": (
        'embedder = "embed"',
        'embeder = "embed"',
        23,
        "corpora.help.embeder",
        "unknown field",
    ),
    "missing": ('tenant = "acme"\nkey', "key", 38, "agents.1.tenant", "is missing"),
    "wrong word": ('engine = "echo"', 'engine = "ecko"', 13, "models.chat.engine", "'echo'"),
    "wrong type": ("threads = 1", 'threads = "all"', 9, "devices.0.threads", "integer"),
    "out of range": ("threads = 1", "threads = 0", 9, "devices.0.threads", "greater"),
    "port": ("metrics_port = 0", "metrics_port = 70000", 3, "system.metrics_port", "65535"),
    "size": ('"2GiB"', '"2 elephants"', 8, "devices.0.memory", "byte"),
    "name": ('name = "demo"', 'name = "Demo!"', 4, "system.name", "1 to 63"),
    "table's name": ("[models.chat]", "[models.CHAT]", 11, "models.CHAT", "1 to 63"),
    "second agent's tenant": (
        'tenant = "acme"\nkey',
        'tenant = "A"\nkey',
        40,
        "agents.1.tenant",
        "1 to 63",
    ),
    "sensitivity": (
        '"confidential"',
        '"hush"',
        25,
        "corpora.help.sensitivity",
        "public, internal, confidential, restricted",
    ),
    "driver": ('driver = "memory"', 'driver = "paper"', 24, "corpora.help.driver", "faiss, memory"),
    "embedder": ('"embed"\n', '"chat"\n', 23, "corpora.help.embedder", "encoders here: embed"),
    "device": ('"cpu:0"', '"cuda:3"', 14, "models.chat.device", "devices here: cpu:0"),
    "device twice": (
        "[models.chat]",
        '[[devices]]\ndriver = "cpu"\n\n[models.chat]',
        11,
        "devices.1.index",
        "listed twice",
    ),
    "base": ("# A demo", 'base = "/"', 1, "base", "unknown field"),
    "no table": ('[system]\nmetrics_port = 0\nname = "demo"', "system = 3", 2, "system", ""),
    "number of 5000 digits": ("threads = 1", "threads = " + "9" * 5000, None, "", "digits"),
    "too deep": ("threads = 1", "threads = " + "[" * 5000 + "]" * 5000, None, "", "deep"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_file_line_and_field(mistake: str) -> None:
    old, new, line, field, said = MISTAKES[mistake]
    assert old in GOOD
    with pytest.raises(SystemFileError) as caught:
        parse(GOOD.replace(old, new, 1))
    error = caught.value
    assert error.file == "system.toml"
    assert error.line == line, str(error)
    assert error.field == field
    assert said in str(error)
    assert str(error).startswith(f"system.toml, line {line}:" if line else "system.toml:")


TOOLS = """\
[tools.booking]
driver = "http"
tenant = "acme"
sensitivity = "confidential"

[tools.booking.options]
url = "http://x/"
headers = { A = "b" }

[tools.mail]
driver = "smtp"
trusted = true

[mailboxes]
attempts = 3

[store]
driver = "postgres"
url = "env:LLMOS_DB"
"""


def test_tools_mailboxes_and_store_are_read() -> None:
    system = parse(TOOLS)
    booking = system.tools["booking"]
    assert booking.driver == "http"
    assert booking.options == {"url": "http://x/", "headers": {"A": "b"}}
    assert booking.labels == Labels(
        tenants=frozenset({"acme"}), sensitivity=Sensitivity.CONFIDENTIAL, trusted=False
    )
    assert system.tools["mail"].trusted
    assert (system.mailboxes.attempts, system.mailboxes.deaths) == (3, 2)
    nothing = parse("")
    assert (nothing.mailboxes.attempts, nothing.mailboxes.deaths) == (5, 2)
    assert (nothing.store.driver, nothing.store.url, nothing.tools) == ("sqlite", None, {})
    assert nothing.store.address({}) is None


def test_the_address_of_the_store_may_stand_in_the_environment() -> None:
    store = parse(TOOLS).store
    address = "postgresql://me:secret@db/llmos"
    assert store.address({"LLMOS_DB": address}) == address
    with pytest.raises(SystemFileError, match="LLMOS_DB is not set"):
        store.address({})
    with pytest.raises(SystemFileError, match="holds no postgresql") as caught:
        store.address({"LLMOS_DB": "mysql://me:secret@db"})
    assert "secret" not in str(caught.value)
    assert caught.value.field == "store.url"
    plain = parse(f'[store]\ndriver = "postgres"\nurl = "{address}"').store
    assert plain.address({}) == address


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "said"),
    [
        ('driver = "http"', 'driver = "telex"', 2, "tools.booking.driver", "http, memory, python"),
        ('driver = "http"', "", 1, "tools.booking.driver", "is missing"),
        ("trusted = true", 'path = "x"', 12, "tools.mail.path", "unknown field"),
        ("attempts = 3", "attempts = 0", 15, "mailboxes.attempts", "greater"),
        ("attempts = 3", "deaths = 0", 15, "mailboxes.deaths", "greater"),
        ("attempts = 3", "barrier = true", 15, "mailboxes.barrier", "unknown field"),
        ('"postgres"', '"oracle"', 18, "store.driver", "'sqlite' or 'postgres'"),
        ('"postgres"', '"sqlite"', 19, "store.url", "sqlite takes none"),
        ('url = "env:LLMOS_DB"', "", 17, "store.url", "postgres needs one"),
        ("env:LLMOS_DB", "env:", 19, "store.url", "or is env:NAME"),
        ("env:LLMOS_DB", "mysql://me:secret@db", 19, "store.url", "begins with postgresql://"),
    ],
)
def test_mistakes_in_tools_mailboxes_and_store(
    old: str, new: str, line: int, field: str, said: str
) -> None:
    assert old in TOOLS
    with pytest.raises(SystemFileError) as caught:
        parse(TOOLS.replace(old, new, 1))
    error = caught.value
    assert (error.line, error.field) == (line, field), str(error)
    assert said in str(error)
    assert "secret" not in str(error)


def test_unknown_and_missing_fields_say_where_all_are_listed() -> None:
    with pytest.raises(SystemFileError) as caught:
        parse("[system]\nnmae = 'x'")
    assert "system-toml" in caught.value.remedy


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemFileError, match="no such file"):
        SystemConfig.read(tmp_path / "none.toml")
    with pytest.raises(SystemFileError):
        SystemConfig.read(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "Gebühr"'.encode("latin-1"))
    with pytest.raises(SystemFileError, match="utf-8"):
        SystemConfig.read(tmp_path / "latin.toml")
    (tmp_path / "good.toml").write_text(GOOD)
    assert SystemConfig.read(tmp_path / "good.toml").base == tmp_path.resolve()


def test_data_may_be_read_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.csv").touch()
    system = parse(GOOD)
    moved = system.with_data({"help": tmp_path / "mine", "things": tmp_path / "mine.csv"})
    assert moved.at(moved.corpora["help"].path) == tmp_path / "mine"
    assert moved.at(moved.graphs["things"].path) == tmp_path / "mine.csv"
    assert system.corpora["help"].path == Path("help")
    with pytest.raises(SystemFileError, match="no corpus or graph of that name") as caught:
        system.with_data({"halp": tmp_path})
    assert caught.value.remedy == "Known: help, things"
    with pytest.raises(SystemFileError, match="no such file or folder"):
        system.with_data({"help": tmp_path / "nowhere"})


WHERE = st.lists(
    st.text(max_size=6) | st.integers(0, 3) | st.sampled_from(["models", "chat", "agents"]),
    max_size=4,
).map(tuple)


@given(st.text(max_size=200) | st.just(GOOD), WHERE)
def test_a_line_is_looked_for_in_anything(text: str, where: tuple[str | int, ...]) -> None:
    line = _line(text, where)
    assert line is None or 1 <= line <= len(text.splitlines())


def mistake_in(text: str) -> SystemFileError | None:
    """What is wrong with a system file; any other error than ours goes through."""
    try:
        parse(text)
    except SystemFileError as error:
        return error
    return None


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_is_read_or_refused_with_a_type(text: str) -> None:
    error = mistake_in(text)
    assert error is None or error.file == "system.toml"


FRAGMENTS = """
[system] | [[agents]] | [models.a] | name="x" | name=3 | tenant="t" | engine="echo" | x=1
source="s" | devices=[1] | models={} | agents=[{}] | [corpora.c] | path=[] | metrics_port=-1
base=1 | program="p" | [hosts] | count=0 | [[models]] | [[devices]] | index=1 | devices=[{}, {}]
"""


@given(st.lists(st.sampled_from(re.split(r" \| |\n", FRAGMENTS.strip())), max_size=8))
def test_any_mixture_of_fields_is_read_or_refused_with_a_type(lines: list[str]) -> None:
    error = mistake_in("\n".join(lines))
    assert error is None or error.line is None or 1 <= error.line <= len(lines)
