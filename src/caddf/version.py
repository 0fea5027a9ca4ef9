"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version of this package, `unknown` where it is run from a source tree that is not installed."""
    try:
        return version("caddf")
    except PackageNotFoundError:
        return "unknown"
