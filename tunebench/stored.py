"""How files hold values as JSON."""

import msgspec


def encode(value: object) -> bytes:
    """A value as JSON, which msgspec reads back as the same type.

    Strings of TVM's and numbers of NumPy's that are also Python's are written as those; a TypeError for anything else.
    """
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: object) -> str | int | float:
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{value!r} has no form in JSON")
