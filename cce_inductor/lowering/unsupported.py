"""What a device's lowering raises for a call it cannot take."""


class Unsupported(Exception):
    """The templates cannot take a call; the message says why."""
