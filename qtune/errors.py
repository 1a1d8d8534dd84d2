"""The one exception that users see: what is wrong, where, and how to mend it."""


class UserError(ValueError):
    """A mistake in a recipe, a file or the environment; the message says how to fix it.

    The command line prints the message and leaves with exit code 2. Anything else that is raised is
    a defect of qtune and keeps its traceback.
    """
