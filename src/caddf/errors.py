"""What a user can get wrong, said in one sentence."""


class InputError(ValueError):
    """Bad input: the message names the setting, the value, and what would be right. The command line exits with 2."""


def at_least_one(**settings: int) -> None:
    """Raises `InputError` on a setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
