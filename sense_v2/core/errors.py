"""The library's error that carries what is wrong and the way out."""


class CommandError(Exception):
    """The library's error that carries what is wrong and the way out: two sentences without their full stops."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(f"{what}. {way_out}")
        self.what, self.way_out = what, way_out
