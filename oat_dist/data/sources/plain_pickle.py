"""Reads a pickle of plain data without running anything: dictionaries, lists, tuples, texts, numbers, NumPy arrays.

A pickle is a program, and Python's own reader runs it. Here its instructions are only looked at (`pickletools`) and
those that build plain data are followed on a stack of our own. Names of functions stay names: the four by which NumPy
and Python 3 write arrays and bytes are known by their form, any other ends the reading, and nothing is ever called.
"""

from __future__ import annotations

import pickletools
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oat_dist.errors import DataError

__all__ = ["read_plain_pickle"]

_INTEGERS = {"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"}
_IGNORED = {"PROTO", "FRAME"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(data: bytes, where: str) -> Any:
    """The value that `data` holds (protocols 2 to 5); arrays only by themselves or as values of its dictionary.

    Texts of Python 2, bytes to it, come as `str` in Latin-1.

    Args:
        where: the name of the file, for error messages.

    Raises:
        DataError: `data` is cut short or no pickle, or holds anything but plain data.
    """
    machine = _Machine(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in texts, which damage may have made
            for instruction, argument, _ in pickletools.genops(data):
                machine.follow(instruction.name, argument)
        return machine.result()
    except DataError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        # the texts of pickletools quote whole pieces of the file
        raise DataError(f"{where}: not a whole pickle; the file is damaged or cut short: fetch it again") from error


@dataclass(frozen=True)
class _Name:
    """`module name` of something a pickle refers to; never looked up."""

    text: str


@dataclass
class _NumberType:
    """What NumPy wrote of an array's element type."""

    text: str
    byte_order: str = "|"


@dataclass
class _Array:
    """An array that NumPy made empty first and filled afterwards, in place."""

    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))


_ENCODE, _RECONSTRUCT, _FROM_BUFFER = "_codecs encode", "multiarray _reconstruct", "numeric _frombuffer"
_NDARRAY, _DTYPE = "numpy ndarray", "numpy dtype"
# NumPy 2 renamed numpy.core
_NAMES = {
    _ENCODE: _ENCODE,
    _NDARRAY: _NDARRAY,
    _DTYPE: _DTYPE,
    **{f"numpy.{core}.{name}": name for core in ("core", "_core") for name in (_RECONSTRUCT, _FROM_BUFFER)},
}
_MARK = object()


def _unwrapped(value: Any) -> Any:
    return value.values if isinstance(value, _Array) else value


class _Machine:
    """Follows the instructions of one pickle."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        (value,) = self.stack
        if isinstance(value, dict):
            return {key: _unwrapped(item) for key, item in value.items()}
        return _unwrapped(value)

    def follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _IGNORED or name == "STOP":
            pass
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _SHORT_TUPLES:
            stack.append(tuple(self._pop(_SHORT_TUPLES[name])))
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(self._name(argument))
        elif name == "STACK_GLOBAL":
            stack.append(self._name(" ".join(self._pop(2))))
        elif name == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._made_by(function, arguments))
        elif name == "BUILD":
            (state,) = self._pop(1)
            self._fill(stack[-1], state)
        else:
            raise self._refusal(f"holds the instruction {name}")

    def _refusal(self, what: str) -> DataError:
        return DataError(
            f"{self.where}: {what}, but only plain data is read from a pickle, since more could run a program; "
            "nothing was run. Fetch the published archive"
        )

    def _pop(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise IndexError
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError
        return self.stack[-1]

    def _name(self, text: str) -> _Name:
        if text not in _NAMES:
            raise self._refusal(f"asks for {text.replace(' ', '.')!r}")
        return _Name(_NAMES[text])

    def _made_by(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        """What a call of one of the known functions would give."""
        match function.text, arguments:
            case "_codecs encode", (str(text), "latin1"):
                return text.encode("latin-1")
            case "multiarray _reconstruct", (_Name(text="numpy ndarray"), (0,), _):
                return _Array()
            case "numpy dtype", (str(text), *_):
                return _NumberType(text)
            case "numeric _frombuffer", (
                bytes() | bytearray() as data,
                _NumberType() as kind,
                tuple(shape),
                str(order),
            ):
                return _Array(self._array(bytes(data), kind, shape, order))
        raise self._refusal(f"calls {function.text.replace(' ', '.')!r} in a way of its own")

    def _fill(self, target: Any, state: Any) -> None:
        match target, state:
            case _NumberType(), (int(), str(byte_order), *_):
                target.byte_order = byte_order
            case _Array(), (int(), tuple(shape), _NumberType() as kind, fortran, str() | bytes() as data):
                raw = data.encode("latin-1") if isinstance(data, str) else data
                target.values = self._array(raw, kind, shape, "F" if fortran else "C")
            case _:
                raise self._refusal("fills an object of its own")

    def _array(self, data: bytes, kind: _NumberType, shape: tuple[Any, ...], order: str) -> np.ndarray:
        if kind.text not in _INTEGERS:
            raise self._refusal(f"holds an array of type {kind.text!r}")
        values = np.frombuffer(data, np.dtype(kind.byte_order + kind.text))
        return values.reshape(shape, order="F" if order == "F" else "C")
