"""What every config checks itself with: one error that names the field and the mend."""

from typing import get_args


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names the field and the mend."""


class ChoiceError(ConfigError):
    """A value that is none of its field's options, so that no other field can make it work."""


def require(condition: bool, field: str, value: object, mend: str) -> None:
    """Raises `ConfigError` naming `field` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: {mend}")


def require_choice(field: str, value: object, choices: object) -> None:
    """Raises `ChoiceError` unless `value` is one of the options of the Literal `choices`."""
    options = get_args(choices)
    if value not in options:
        named = ", ".join(map(repr, options))
        raise ChoiceError(f"{field}={value!r}: choose one of {named}")
