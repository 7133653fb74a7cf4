"""Files of settings: values and lines, against PyYAML's own; and files that are made to do harm."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_embeddings_server import yaml_file
from mlx_embeddings_server.yaml_file import Location, YamlFile, dotted

_fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def read(folder: Path, content: str | bytes) -> YamlFile:
    file = folder / "models.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return yaml_file.read(str(file))


def problem(folder: Path, content: str | bytes) -> str:
    """The only thing that is wrong, in seconds at most."""
    before = time.process_time()
    [found] = read(folder, content).problems
    assert time.process_time() - before < 20
    assert found.message.isprintable() and len(found.message) < 1000
    return f"{found.line}: {found.message}"


@_fuzzed
@given(content=st.dictionaries(st.text(max_size=6), _values, max_size=4))
def test_values_are_what_was_written(tmp_path: Path, content: dict[str, Any]) -> None:
    file = read(tmp_path, yaml.safe_dump(content))
    assert file.problems == () and file.values == content


@_fuzzed
@given(content=st.text(alphabet=list("ab1:-?[]{},&*!|>%@#\"'\\<= \n\t~.0x_u\x85\ufeff")) | st.binary())
def test_no_file_breaks_the_reader(tmp_path: Path, content: str | bytes) -> None:
    file = read(tmp_path, content)
    assert all(each.message for each in file.problems)
    if not file.problems:
        assert (yaml.safe_load(content) or {}).keys() == file.values.keys()


def test_every_value_has_its_line(tmp_path: Path) -> None:
    file = read(tmp_path, "a: 1\nb:\n  c:\n    - x\n    - {d: e,\n       f: g}\n\nh: |\n  long\n")
    expected: dict[Location, int] = {
        ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 4, ("b", "c", 1): 5, ("b", "c", 1, "f"): 6, ("h",): 8,
    }  # fmt: skip
    assert {location: file.line(location) for location in expected} == expected
    assert file.line(("b", "c", 7, "x")) == 3  # of what is lacking: where it would stand
    assert file.line(("z",)) is None
    assert dotted(("b", "c", 1, "f")) == "b.c[1].f"


def test_anchors_and_merge_keys_mean_what_they_mean_elsewhere(tmp_path: Path) -> None:
    content = "a: &a {x: 1, y: 2}\nb: &b {y: 3}\nc:\n  <<: [*a, *b]\n  y: 4\nd: {<<: *a}\ne: [*b, *b]\n"
    file = read(tmp_path, content)
    assert file.problems == () and file.values == yaml.safe_load(content)
    assert (file.line(("c", "y")), file.line(("c", "x"))) == (5, 1)


def test_dates_stay_as_they_are_typed(tmp_path: Path) -> None:
    assert read(tmp_path, "revision: 2026-01-02\n").values == {"revision": "2026-01-02"}


def test_a_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    file = read(tmp_path, "a: 1\r\nb: 2\r\n".encode("utf-8-sig"))
    assert file.values == {"a": 1, "b": 2} and file.line(("b",)) == 2


def test_an_empty_file_is_no_problem(tmp_path: Path) -> None:
    for content in ("", "# nothing\n", "---\n"):
        file = read(tmp_path, content)
        assert file.values == {} and (file.problems == () or content == "---\n")


def test_all_keys_that_stand_twice_are_told(tmp_path: Path) -> None:
    file = read(tmp_path, "a: 1\nb:\n  c: 2\n  'c': 3\n  d: [{e: 1, e: 2}]\na: 4\n")
    assert [(each.line, each.message) for each in file.problems] == [
        (4, "b.c: stands here a second time, first in line 3"),
        (5, "b.d[0].e: stands here a second time, first in line 5"),
        (6, "a: stands here a second time, first in line 1"),
    ]


@pytest.mark.parametrize("key", ["1", "yes", "null", "1.5", "[a]", "{a: b}", "? [a]\n"])
def test_keys_are_text(tmp_path: Path, key: str) -> None:
    said = problem(tmp_path, f"a: 1\nb:\n  {key}: 2\n" if not key.startswith("?") else "a: 1\nb:\n  ? [a]\n  : 2\n")
    assert said.startswith("3: b: ") and "is no text: put it in quotes" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\n\tb: 2\n", "2: this is not YAML: .*cannot start any token"),
        ("a: [1\nb: 2\n", "2: this is not YAML: while parsing a flow sequence of line 1"),
        ("a: 1\n b: 2\n", "2: this is not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "2: this is not YAML: .*another document"),
        ("a: 1\nb: *c\n", "2: this is not YAML: .*undefined alias"),
        ("a: 1\nb: \x07\n", r"2: this is not YAML: the character '\\x07' is not allowed"),
        (b"a: 1\nb: \xff\n", "2: cannot be read: it is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "1: cannot be read: it is not UTF-8"),
        ("a: !!python/object/apply:os.system [ls]\n", "1: .*the tag tag:yaml.org,2002:python/.* is not known"),
        ("a: !!python/name:os.system ''\n", "1: .*the tag .* does not fit"),
        ("a: !!int ''\n", "1: .*the tag .* does not fit"),
        ("a: !!set {b}\n", "1: .*the tag .* is not known"),
        ("a: 0x_\n", "this is not YAML: invalid literal"),
        ('a: "\\UFFFFFFFF"\n', "this is not YAML: "),
        ('a: "\\ud800"\n', "1: .*half a character"),
        ("a:\n  <<: 3\n", "2: .*expected a mapping"),
        (f"a: {'1' * 5000}\n", "1: .*too many digits"),
    ],
)
def test_what_is_not_plain_data_is_refused_with_its_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    assert re.search(said, problem(tmp_path, content))


# Harm: bounded in time and memory


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    assert "is larger than 256 KiB" in problem(tmp_path, "# " + "x" * 300_000)


def test_the_largest_files_take_seconds(tmp_path: Path) -> None:
    lines = "".join(f"k{number}: {{a: [1, 2], b: 'x'}}\n" for number in range(20_000))[:250_000].rpartition("\n")[0]
    assert "values or 30 levels" in problem(tmp_path, lines)


@pytest.mark.parametrize("merge", [False, True])
def test_a_bomb_of_anchors_is_refused_before_it_goes_off(tmp_path: Path, merge: bool) -> None:
    """Nine levels of nine: a billion values, of a file of a few lines."""
    lines = ["a0: &a0 {x: lol}"]
    for level in range(1, 10):
        many = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{many}]}}" if merge else f"a{level}: &a{level} [{many}]")
    said = problem(tmp_path, "\n".join(lines))
    assert said.startswith(("5: ", "6: "))
    assert "with its anchors written out this has more than 50000 values" in said


@pytest.mark.parametrize("content", ["a: &a [*a]\n", "a: &a\n  b: {c: *a}\n", "a: &a {<<: *a}\n", "&a {*a : 1}\n"])
def test_anchors_that_hold_themselves(tmp_path: Path, content: str) -> None:
    assert "*a stands within what it names, and would never end" in problem(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        "a: " + "[" * 100_000,
        "a: " + "{b: " * 50_000,
        "- " * 100_000,
        "\n".join(["a0: &a0 []", *(f"a{place}: &a{place} [*a{place - 1}]" for place in range(1, 300))]),
    ],
)
def test_depth(tmp_path: Path, content: str) -> None:
    assert "30 levels" in problem(tmp_path, content)


def test_no_file_and_no_file_at_all(tmp_path: Path) -> None:
    [missing], [folder] = yaml_file.read(str(tmp_path / "none")).problems, yaml_file.read(str(tmp_path)).problems
    assert (missing.line, folder.line) == (None, None)
    assert "there is no file" in missing.message and "cannot be read" in folder.message
