"""Random damage to bytes, text, JSON values and safetensors headers, for the fuzzer."""

import copy
import json
import random
from typing import Any

CHANGES = (1, 1, 1, 2, 4)

_INTEGERS = [
    number.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for number in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("little", "big")
]

HOSTILE_TEXTS = (
    "",
    " ",
    "nan",
    "-inf",
    "1e999",
    "-1",
    "0",
    "1e-400",
    "9" * 400,
    "0x10",
    "1_0",
    "\u0661",
    "\0",
    "\n",
    "\r",
    '"',
    ",",
    ";",
    "=",
    " for ",
    "..",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "x" * 5000,
    "\x1b[2J",
    "\x9b2J",
    "\x7f",
    "\ud800",
    "\u202e",
    "\ufeff",
)

HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**4000,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [0] * 1000,
    {"x": {"x": {"x": None}}},
    *HOSTILE_TEXTS,
)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes in a few places."""
    changed = bytearray(data)
    for _ in range(rng.choice(CHANGES)):
        at = rng.randint(0, len(changed))
        stop = min(len(changed), at + rng.choice((1, 2, 8, 64, 1024)))
        kind = rng.randrange(7)
        if kind <= 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at:stop]
        elif kind == 4:
            changed[at:at] = rng.randbytes(rng.choice((1, 3, 16, 300)))
        elif kind == 5:
            changed[at:at] = changed[at:stop]
        else:
            number = rng.choice(_INTEGERS)
            changed[at : at + len(number)] = number
    return bytes(changed)


def changed_text(rng: random.Random, text: str, separators: str = ",\n") -> str:
    """Replace, empty or insert a few of the words between `separators`."""
    words: list[str] = [""]
    for character in text:
        if character in separators:
            words += [character, ""]
        else:
            words[-1] += character
    for _ in range(rng.choice(CHANGES)):
        at = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind <= 1:
            words[at] = rng.choice((*HOSTILE_TEXTS, rng.choice(words)))
        elif kind == 2:
            words[at] = ""
        else:
            words.insert(at, rng.choice(words))
    return "".join(words)


def changed_json(rng: random.Random, value: Any) -> Any:
    """Return a copy in which one or two values are removed, added or replaced with hostile ones."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 2)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        elif kind == 3 and holder is not root:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(HOSTILE_TEXTS)] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        else:
            holder[key] = copy.deepcopy(rng.choice(places)[0])
    return root[0]


def _places(value: Any) -> Any:
    """Yield (container, key) of every value inside a JSON value, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(entries):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def changed_json_text(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes of a JSON file after changing values, or sometimes after changing bytes."""
    if rng.random() < 0.2:
        return changed_bytes(rng, data)
    if rng.random() < 0.05:
        return rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b""))
    return json.dumps(changed_json(rng, json.loads(data))).encode()


def changed_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes of a safetensors file with a changed header, or with changed bytes.

    The length in front of a changed header is usually right, but sometimes wrong.
    """
    if rng.random() < 0.3:
        return changed_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    text = changed_json_text(rng, header)
    if rng.random() < 0.5:
        text = text.ljust(length)
    claimed = (
        len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
    )
    return claimed.to_bytes(8, "little") + text + rest
