"""The one exception that users see: what is wrong, where, and how to mend it."""


class UserError(ValueError):
    """A mistake in a recipe, a file or the environment; the message says how to fix it.

    The command line prints the message and leaves with exit code 2. Anything else that is raised is
    a defect of qtune and keeps its traceback.
    """


def check_at_least(section: object, name: str, least: float, *keys: str) -> None:
    """Raises UserError where a key of a recipe's section, called `name`, is set below `least`."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and value < least:
            raise UserError(f"{name}.{key} ({value}) must be at least {least}")
