"""The one exception that the command line turns into a line of text instead of a traceback."""


class UserError(ValueError):
    """Something the user can put right: the message says what came and what is wanted."""
