"""A YAML file's values and the lines they stand on. What is wrong with the file is told, all of it, and raised nowhere.

Only plain data comes of it: mappings with text for keys, lists, text, numbers, true, false, null. Time and memory are
bounded whatever the file holds: by its size, by its depth, and by how much its anchors make of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

_MAX_BYTES = 256 * 1024  # a thousand models, described at length; PyYAML reads it in seconds
_MAX_DEPTH = 30
_MAX_NODES = 50_000  # with what anchors stand for written out
_MAX_SHOWN = 100  # characters of a key, in messages
_MAX_NUMBER = 100  # characters: turning digits into a number takes the square of the time

_TAG = "tag:yaml.org,2002:"

Location = tuple[str | int, ...]  # keys and places in lists, from the top


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that must be put right."""

    line: int | None  # from 1; None: of the whole file
    message: str


@dataclass(frozen=True, slots=True)
class YamlFile:
    """What could be read, and what was wrong."""

    path: str
    values: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[Location, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    def line(self, location: Location) -> int | None:
        """Where it stands; of what is not there, where that would be which it belongs to."""
        known = (location[:length] for length in range(len(location), 0, -1))
        return next((self.lines[each] for each in known if each in self.lines), None)


def dotted(location: Location) -> str:
    """`models.bge-m3.aliases[1]`, fit for a terminal whatever the keys are."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in location)[1:]


def _shown(key: str) -> str:
    short = key if len(key) <= _MAX_SHOWN else f"{key[:_MAX_SHOWN]}..."
    return short if short.isprintable() and short else ascii(short)


def read(path: str) -> YamlFile:
    """Read and check; never raises for what is in the file, nor for there being none."""
    try:
        if Path(path).is_fifo():
            return _refused(path, "cannot be read: it is a pipe, which may never end; give a file")
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            return _refused(path, f"is larger than {_MAX_BYTES // 1024} KiB, which no file of settings needs")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        return YamlFile(path, problems=(Problem(None, f"there is no file {path}"),))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _refused(path, "cannot be read: it is not UTF-8; save it as UTF-8", line)
    except (OSError, ValueError) as error:  # ValueError: a name that can be no file's
        return _refused(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    return _parse(path, text)


def _refused(path: str, message: str, line: int | None = None) -> YamlFile:
    return YamlFile(path, problems=(Problem(line, message if line else f"{path} {message}"),))


def _parse(path: str, text: str) -> YamlFile:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return YamlFile(path)
        if not isinstance(root, yaml.MappingNode):
            return _refused(path, "must hold settings, one `key: value` a line")
        values = loader.plain(root, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _refused(path, f"this is not YAML: the character {chr(int(error.character))!a} is not allowed", line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # Some messages begin with what was being read, and where that began.
        begun = error.context_mark.line + 1 if error.context_mark else None
        context = f"{error.context} of line {begun}, " if error.context and begun else ""
        said = f"this is not YAML: {context}{error.problem}"
        return _refused(path, said[:500], mark.line + 1 if mark else None)
    except (ValueError, OverflowError) as error:  # PyYAML's own slips: numbers of no digits, characters beyond Unicode
        return _refused(path, f"this is not YAML: {str(error)[:200]}", loader.line + 1)
    return YamlFile(path, values, loader.lines, tuple(sorted(loader.problems, key=lambda each: each.line or 0)))


class _Loader(yaml.SafeLoader):
    """Composes nodes of bounded number and depth, and makes plain values of them."""

    # Dates stay as they are typed: `revision: 2026-01-01` is the name of a branch.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[Location, int] = {}
        self.problems: list[Problem] = []
        self._around: list[yaml.Node | int | None] = []  # keys and places of what is being composed
        self._sizes: dict[int, tuple[int, int]] = {}  # of composed nodes, by id: nodes with all within, and levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()
        if len(self._around) >= _MAX_DEPTH:
            raise _refusal(f"more than {_MAX_DEPTH} levels", event)
        self._around.append(index)
        node = super().compose_node(parent, index)
        self._around.pop()
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:  # composed to its end it is not: the anchor is around this
                raise _refusal(f"*{event.anchor} stands within what it names, and would never end", event)
        elif node is not None:
            self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> None:
        """Raises `ComposerError` before anything is made of too many nodes."""
        within = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [child for each in within for child in (each if isinstance(each, tuple) else (each,))]
        sizes = [self._sizes[id(child)] for child in children]
        count, levels = 1 + sum(nodes for nodes, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
        if count > _MAX_NODES or levels > _MAX_DEPTH:
            raise _refusal(
                f"with its anchors written out this has more than {_MAX_NODES} values or {_MAX_DEPTH} levels", node
            )
        self._sizes[id(node)] = count, levels

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Now, before merge keys are put in their places, a key that stands twice was typed twice."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = f"the key {key.value[:50]}" if isinstance(key, yaml.ScalarNode) else "a key"
                self._report(line, f"{shown} is no text: put it in quotes")
            elif key.value in first:
                self._report(line, "stands here a second time, first in line " + str(first[key.value]), key)
            else:
                first[key.value] = line
        return node

    def _report(self, line: int, message: str, *place: yaml.Node) -> None:
        around = [each.value if isinstance(each, yaml.ScalarNode) else each for each in (*self._around, *place)]
        where = dotted(tuple(each for each in around if isinstance(each, str | int)))
        self.problems.append(Problem(line, f"{where}: {message}" if where else message))

    def plain(self, node: yaml.Node, location: Location) -> Any:
        """The node's value. Notes the lines of all that is within."""
        self.lines.setdefault(location, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            self.flatten_mapping(node)
            keyed = [(key, child) for key, child in node.value if key.tag == f"{_TAG}str"]
            # Merged keys come first, and give way to the mapping's own of that name.
            self.lines.update({(*location, key.value): key.start_mark.line + 1 for key, _ in keyed})
            return {key.value: self.plain(child, (*location, key.value)) for key, child in keyed}
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.plain(child, (*location, place)) for place, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise _refusal(f"the tag {node.tag} is not known", node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == f"{_TAG}str":
            if any("\ud800" <= character <= "\udfff" for character in node.value):
                raise _refusal("half a character (a surrogate)", node)
            return node.value
        # A tag that was typed may not fit the text behind it, and then breaks what constructs it.
        fitting = self.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag != fitting:
            raise _refusal(f"the tag {node.tag} does not fit", node)
        if len(node.value) > _MAX_NUMBER:
            raise _refusal("a number of too many digits", node)
        return self.construct_object(node)


def _refusal(problem: str, at: yaml.Event | yaml.Node) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, problem, cast("yaml.error.Mark", at.start_mark))
