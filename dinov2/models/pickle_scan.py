"""Whether a pickle is a bomb: small as a file, without end in time or memory once it is read.

PyTorch's restricted unpickler runs no foreign code, but it builds whatever a file describes. A value named
again and again doubles with every level, and some of the functions it may call make much from little. So
the operations of a pickle are gone through first, with numbers in place of the values.
"""

import pickle
import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_REPEATED = 1_000_000  # values that come again by reference; a training checkpoint has a few thousand
MAX_DEPTH = 1000  # tuples are hashed recursively, and too many end the process
LETTERS_PER_VALUE = 16

# Names, whatever the module: allocates any number of bytes; writes out a tensor that repeats one value.
EXPANDING = {"bytearray", "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy"}
CODEC = "latin1"  # that of bytes in a pickle; others take time that grows with the square of a text

# What the restricted unpickler knows; whatever else is in a file ends its reading in any case.
PUSHES = {"GLOBAL", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
PUSHES |= {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
JOINS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "NEWOBJ": 2, "REDUCE": 2, "BINPERSID": 1}  # -> items taken
GROWS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}


@dataclass(slots=True, eq=False)
class _Value:
    """What is known of a value: size, depth, the text it is or ends with, whether another one holds it."""

    weight: int = 1
    depth: int = 1
    text: str | None = None
    held: bool = False


def check_pickle(stream: BinaryIO) -> None:
    """Go through one pickle up to its end, and leave the stream there.

    Raises:
        pickle.UnpicklingError: It would expand without end, or calls what could.
        Exception: It is damaged; of various types.
    """
    scan = _Scan()
    for operation, argument, _ in pickletools.genops(stream):
        scan.step(operation.name, argument)


class _Scan:
    """The unpickler's stack and memory, with :class:`_Value` for values."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.marked: list[list[_Value]] = []
        self.memory: dict[int, _Value] = {}
        self.repeated = 0

    def step(self, name: str, argument: Any) -> None:
        """Do what one operation does."""
        if name in PUSHES:
            self._push(name, argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memory[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            value = self.memory[argument]
            self.repeated += value.weight - 1
            if self.repeated > MAX_REPEATED:
                raise _endless("values that repeat each other")
            self.stack.append(value)
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in JOINS:
            self._join(name, self._taken(JOINS[name]))
        elif name == "TUPLE":
            self._join(name, self._since_mark())
        elif name in GROWS:
            self._grow(self._taken(GROWS[name]))
        elif name in ("APPENDS", "SETITEMS"):
            self._grow(self._since_mark())
        elif name not in ("PROTO", "STOP"):
            raise pickle.UnpicklingError(f"Unsupported operand {name}")

    def _push(self, name: str, argument: Any) -> None:
        text = argument if isinstance(argument, str) else None
        if name == "GLOBAL":  # module and name with a space between them
            text = argument.rpartition(" ")[2]
            if text in EXPANDING:
                raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {argument.replace(' ', '.')}")
        self.stack.append(_Value(1 + len(text or "") // LETTERS_PER_VALUE, text=text))

    def _taken(self, count: int) -> list[_Value]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _since_mark(self) -> list[_Value]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _join(self, name: str, items: list[_Value]) -> None:
        if name == "REDUCE" and items[0].text == "encode" and items[1].text != CODEC:
            raise pickle.UnpicklingError("Unsupported global: GLOBAL _codecs.encode")
        joined = _Value(text=items[1].text if name == "TUPLE2" else None)
        self.stack.append(joined)
        self._grow(items)

    def _grow(self, items: list[_Value]) -> None:
        """Add items to the value on top."""
        whole = self.stack[-1]
        if (
            whole.held
        ):  # what holds it would grow unseen; without cycles a value is complete before it is held
            raise _endless("a value that holds itself")
        for item in items:
            item.held = True
            whole.weight += item.weight
            whole.depth = max(whole.depth, item.depth + 1)
        if whole.depth > MAX_DEPTH:
            raise _endless(f"more than {MAX_DEPTH} levels")


def _endless(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f"containers nested without end: {what}")
