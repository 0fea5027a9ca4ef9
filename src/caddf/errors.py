"""What a user can get wrong, said in one sentence."""


class InputError(ValueError):
    """Bad input: the message names the setting, the value, and what would be right. The command line exits with 2."""
