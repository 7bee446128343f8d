import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.engine.errors import DriveSimError
from driving_sim.play.serving import protocol

CONTROL = {"type": "control", "wheel": 0.5, "throttle": 0.0, "brake": 1.0, "stamp": 12.5}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def refusal(text: str) -> str:
    """Return why a message is refused, or "" if it is read."""
    try:
        protocol.parse(text)
    except DriveSimError as error:
        return str(error)
    return ""


def test_a_message_is_read() -> None:
    message = protocol.parse(json.dumps(CONTROL))
    assert message == protocol.Control(
        type="control", wheel=0.5, throttle=0.0, brake=1.0, stamp=12.5
    )


@pytest.mark.parametrize(
    "change",
    [
        {"wheel": 1.5},
        {"wheel": "0"},
        {"wheel": None},
        {"throttle": -0.1},
        {"stamp": float("nan")},
        {"stamp": float("inf")},
        {"extra": 1},
        {"type": "steer"},
    ],
)
def test_a_wrong_message_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(DriveSimError, match="does not know") as caught:
        protocol.parse(json.dumps(CONTROL | change))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text() | st.dictionaries(st.text(), ANYTHING).map(json.dumps))
def test_any_text_is_read_or_refused(text: str) -> None:
    assert "\n" not in refusal(text)


@given(st.sampled_from(sorted(protocol.Message.__subclasses__(), key=str)), st.data())
def test_any_field_is_read_or_refused(kind: type[protocol.Message], data: st.DataObject) -> None:
    name = kind.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
    fields = {field: data.draw(ANYTHING) for field in kind.model_fields if field != "type"}
    assert "\n" not in refusal(json.dumps({"type": name} | fields))


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_a_binary_message_says_where_its_parts_are(parts: list[bytes]) -> None:
    packed = protocol.binary("frame", {"frame": 3}, parts)
    (length,) = struct.unpack("<I", packed[:4])
    header = json.loads(packed[4 : 4 + length])
    assert header["type"] == "frame"
    assert header["frame"] == 3
    read, at = [], 4 + length
    for size in header["parts"]:
        read.append(packed[at : at + size])
        at += size
    assert read == parts
    assert at == len(packed)
